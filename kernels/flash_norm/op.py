"""The custom ops ``flashnorm::flash_norm`` and ``flashnorm::materialize_norms``.

The gradient of a linear layer's weight is, for one sample, the product of the output's gradient
seen as left_b [m, T] and of the input right_b [T, n]. One op takes its squared norm alone, the
other keeps the product too.

Precision: products of 16-bit numbers are exact and are added up in float32. Those of float32
numbers are float32's own, or TF32's where
``torch.backends.cuda.matmul.fp32_precision`` (which ``torch.set_float32_matmul_precision`` sets)
says so at the time of the call. Results repeat bit by bit: nothing is added atomically.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm_compile.kernels.flash_norm import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Elements of products that the CPU holds at once.
CHUNK_ELEMENTS = 2**24


@torch.library.custom_op("flashnorm::flash_norm", mutates_args=())
def flash_norm(left: Tensor, right: Tensor, bias: bool = False) -> tuple[Tensor, Tensor]:
    """Return the squared Frobenius norm of ``left_b @ right_b`` for every sample b.

    On a GPU the product is never written, unless there are too few tiles of it to fill the GPU:
    then the tokens are split, and float32 parts of the product take a few tens of MB for a while.

    Args:
        left: [B, m, T], bfloat16, float16 or float32; any strides.
        right: [B, T, n], of the same dtype; any strides. Fast where each operand has a dim of
            stride 1, and addresses and other strides are multiples of 16 bytes.
        bias: whether to return ``‖Σ_t left_b[:, t]‖²`` as well, the squared norm of the bias's
            gradient.

    Returns:
        New float32 tensors: squares [B], and squares of the bias [B], or [0] if not asked for.
        A sample whose operands are not finite gets infinity or NaN, and changes no other's.

    Raises:
        ValueError: an argument has the wrong dtype or shape, or they do not fit each other.
    """
    _validate("flash_norm", left, right)
    return reference.flash_norm(left, right, bias)


@torch.library.custom_op("flashnorm::materialize_norms", mutates_args=())
def materialize_norms(
    lefts: list[Tensor], rights: list[Tensor], out_dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Return ``lefts[k]_b @ rights[k]_b`` for every layer k, and squared norms over all layers.

    The norms are those of the rounded products, since that is what is added up later. Layers of one
    call share launches, if they are read in the same way: together they fill a GPU to the last
    where one does not, and spare the host.

    Args:
        lefts: at least one [B, m, T], B the same for all; each as in `flash_norm`.
        rights: [B, T, n] each, as in `flash_norm`.
        out_dtype: dtype of the products: bfloat16, float16 or float32.

    Returns:
        New tensors: products [B, m, n], row-major, and float32 squares [B], added up over layers.

    Raises:
        ValueError: an argument has the wrong dtype or shape, or they do not fit each other.
    """
    _validate_layers(lefts, rights, out_dtype)
    found = [
        reference.materialize_norm(left, right, out_dtype)
        for left, right in zip(lefts, rights, strict=True)
    ]
    return [products for products, _ in found], torch.stack([x for _, x in found]).sum(0)


def materialize_norm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the products [B, m, n] and squares [B] of `materialize_norms` for one layer."""
    (products,), squares = materialize_norms([left], [right], out_dtype)
    return products, squares


@flash_norm.register_fake
def _(left: Tensor, right: Tensor, bias: bool = False) -> tuple[Tensor, Tensor]:
    _validate("flash_norm", left, right)
    samples = left.shape[0]
    squares = left.new_empty((samples,), dtype=torch.float32)
    return squares, left.new_empty((samples if bias else 0,), dtype=torch.float32)


@materialize_norms.register_fake
def _(
    lefts: list[Tensor], rights: list[Tensor], out_dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    _validate_layers(lefts, rights, out_dtype)
    products = [
        left.new_empty((*left.shape[:2], right.shape[2]), dtype=out_dtype)
        for left, right in zip(lefts, rights, strict=True)
    ]
    return products, lefts[0].new_empty((lefts[0].shape[0],), dtype=torch.float32)


@flash_norm.register_kernel("cpu")
def _(left: Tensor, right: Tensor, bias: bool = False) -> tuple[Tensor, Tensor]:
    _validate("flash_norm", left, right)
    squares = left.new_empty(left.shape[0], dtype=torch.float32)
    bias_squares = left.new_empty(left.shape[0] if bias else 0, dtype=torch.float32)
    for some in _chunks(left, right):
        squares[some], found = reference.flash_norm(left[some], right[some], bias)
        if bias:
            bias_squares[some] = found
    return squares, bias_squares


@materialize_norms.register_kernel("cpu")
def _(
    lefts: list[Tensor], rights: list[Tensor], out_dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    _validate_layers(lefts, rights, out_dtype)
    squares = lefts[0].new_zeros(lefts[0].shape[0], dtype=torch.float32)
    outs = []
    for left, right in zip(lefts, rights, strict=True):
        products = left.new_empty((*left.shape[:2], right.shape[2]), dtype=out_dtype)
        for some in _chunks(left, right):
            products[some], found = reference.materialize_norm(left[some], right[some], out_dtype)
            squares[some] += found
        outs.append(products)
    return outs, squares


@flash_norm.register_kernel("cuda")
def _(left: Tensor, right: Tensor, bias: bool = False) -> tuple[Tensor, Tensor]:
    # Imported here: the package must import where Triton is not installed.
    from flashnorm_compile.kernels.flash_norm import launch

    _validate("flash_norm", left, right)
    return launch.flash_norm(left, right, bias)


@materialize_norms.register_kernel("cuda")
def _(
    lefts: list[Tensor], rights: list[Tensor], out_dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    from flashnorm_compile.kernels.flash_norm import launch

    _validate_layers(lefts, rights, out_dtype)
    return launch.materialize_norms(lefts, rights, out_dtype)


def _chunks(left: Tensor, right: Tensor) -> list[slice]:
    """Cut the samples so that the products of a part are not too large."""
    samples, size = left.shape[0], max(1, left.shape[1] * right.shape[2])
    step = max(1, CHUNK_ELEMENTS // size)
    return [slice(first, first + step) for first in range(0, samples, step)]


def _validate_layers(
    lefts: list[Tensor], rights: list[Tensor], out_dtype: torch.dtype
) -> None:
    if not lefts or len(lefts) != len(rights):
        raise ValueError(
            f"materialize_norms: {len(lefts)} lefts and {len(rights)} rights; "
            "expected the same number of each, 1 or more"
        )
    for k, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        _validate("materialize_norms", left, right, out_dtype)
        sizes = lefts[0].shape[0], left.shape[0]
        # Only sizes that are known: a comparison of symbolic ones would fix them.
        known = all(isinstance(size, int) for size in sizes)
        if left.device != lefts[0].device or (known and sizes[0] != sizes[1]):
            raise ValueError(
                f"materialize_norms: lefts[{k}] holds {sizes[1]} samples on {left.device} and "
                f"lefts[0] {sizes[0]} on {lefts[0].device}; expected the same for all"
            )


def _validate(
    op: str, left: Tensor, right: Tensor, out_dtype: torch.dtype = torch.float32
) -> None:
    for name, tensor, shape in (("left", left, "[B, m, T]"), ("right", right, "[B, T, n]")):
        if tensor.dim() != 3 or tensor.dtype not in DTYPES:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype}, {tensor.dim()}-d; "
                f"expected {shape} of bfloat16, float16 or float32"
            )
    if left.dtype != right.dtype:
        raise ValueError(
            f"{op}: left is {left.dtype} and right is {right.dtype}; expected one dtype"
        )
    if out_dtype not in DTYPES:
        raise ValueError(f"{op}: out_dtype is {out_dtype}; expected bfloat16, float16 or float32")
    if left.device != right.device:
        raise ValueError(
            f"{op}: left is on {left.device} and right on {right.device}; expected one device"
        )
    for name, sizes in (
        ("samples", (left.shape[0], right.shape[0])),
        ("tokens", (left.shape[2], right.shape[1])),
    ):
        # Only sizes that are known: a comparison of symbolic ones would fix them.
        if all(isinstance(size, int) for size in sizes) and sizes[0] != sizes[1]:
            raise ValueError(
                f"{op}: left holds {sizes[0]} {name} and right {sizes[1]}; "
                "expected left [B, m, T] and right [B, T, n]"
            )
