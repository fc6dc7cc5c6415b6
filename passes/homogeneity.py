"""Operations by name, as functions of a factor that their arguments share."""

from __future__ import annotations

# Arguments that give a shape; what the shape does is the batch-axis analysis's affair.
SHAPES = frozenset(
    {
        "size", "shape", "sizes", "input_sizes", "input_size", "self_size", "output_size",
        "split_size", "split_sizes", "stride", "stride_", "storage_offset", "length", "end",
        "start", "step", "repeats", "dims", "symint", "layout", "device", "dtype",
    }
)  # fmt: skip
FILLS = ("full", "zeros", "ones", "scalar_tensor", "full_like", "zeros_like", "ones_like",
          "new_zeros", "new_ones", "new_full")  # fmt: skip
# Linear in these arguments together; the others must hold no B.
LINEAR = {
    "add": ("self", "other", "a", "b"),
    "sub": ("self", "other", "a", "b"),
    "neg": ("self",),
    "sum": ("self", "inp"),
    "mean": ("self",),
    "cumsum": ("self",),
    "where": ("self", "other", "a", "b"),
    "masked_fill": ("self", "value"),
    "abs": ("self",),
    "clone": ("self",),
    "alias": ("self",),
    "detach": ("self",),
    "_to_copy": ("self",),
    "convert_element_type": ("a",),
    "device_put": ("a",),
    "copy": ("src",),
    "real": ("self",),
    "imag": ("self",),
    "_conj": ("self",),
    "conj": ("self", "x"),
    "complex": ("real", "imag"),
    "view_as_real": ("self",),
    "view_as_complex": ("self",),
    "index": ("self",),
    "_unsafe_index": ("self",),
    "_unsafe_masked_index": ("self", "fill"),
    "_unsafe_masked_index_put_accumulate": ("self", "values"),
    "index_put": ("self", "values"),
    "_unsafe_index_put": ("self", "values"),
    "index_select": ("self",),
    "index_add": ("self", "source"),
    "gather": ("self",),
    "scatter": ("self", "src", "value"),
    "scatter_add": ("self", "src"),
    "constant_pad_nd": ("self", "value"),
    "tril": ("self",),
    "triu": ("self",),
    "trace": ("self",),
    "linalg_lu_solve": ("B",),
    "linalg_solve_triangular": ("B",),
    "_fft_c2c": ("self",),
    "_fft_r2c": ("self",),
    "_fft_c2r": ("self",),
    "_trilinear": (),
}
# Products of the second group, plus the first.
PRODUCTS = {
    "mul": ((), ("self", "other", "a", "b")),
    "mm": ((), ("self", "mat2")),
    "bmm": ((), ("self", "mat2")),
    "mv": ((), ("self", "vec")),
    "dot": ((), ("self", "tensor")),
    "vdot": ((), ("self", "other")),
    "addmm": (("self",), ("mat1", "mat2")),
    "baddbmm": (("self",), ("batch1", "batch2")),
    "addcmul": (("self",), ("tensor1", "tensor2")),
    "fma": (("c",), ("a", "b")),
    "convolution": (("bias",), ("input", "weight")),
}
COMPARISONS = ("eq", "ne", "gt", "ge", "lt", "le")
# Rule files of ops that move entries, all linear in their tensors.
MOVES = ("views", "shape_ops", "strides", "view_gradients")
