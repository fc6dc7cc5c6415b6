"""Linear algebra and Fourier transforms: the dims that they leave alone are batches."""

from __future__ import annotations

from flashnorm_compile.passes.batch_axis.call import Call, several, shape_of, tensor_arguments
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.values import Batched, Value

SOLVES = "takes samples for the rows or columns of a matrix"


@rule(
    "aten.cholesky",
    "aten.cholesky_inverse",
    "aten.cholesky_solve",
    "aten.inverse",
    "aten.linalg_cholesky_ex",
    "aten.linalg_eig",
    "aten._linalg_eigh",
    "aten._linalg_eigvals",
    "aten.linalg_eigvals",
    "aten.linalg_inv_ex",
    "aten.linalg_ldl_factor_ex",
    "aten.linalg_lu",
    "aten.linalg_lu_factor_ex",
    "aten.linalg_matrix_exp",
    "aten.linalg_qr",
    "aten.linalg_solve_triangular",
    "aten._linalg_svd",
    "aten._linalg_det",
    "aten._linalg_slogdet",
    "aten._linalg_solve_ex",
    "aten.triangular_solve",
    batched=None,
)
def matrices(call: Call) -> Value:
    """Work on the last two dims of tensors with the same leading dims."""
    tensors = tensor_arguments(call)
    axis = call.join(call.value(node) for node in tensors)
    if len({shape_of(node)[: call.ndim - 2] for node in tensors}) != 1:
        return call.mixed("no batch-axis rule for matrices that broadcast")
    if len({node.meta["val"].dim() for node in tensors}) != 1:
        return call.mixed("no batch-axis rule for matrices that broadcast")
    if isinstance(axis, Batched) and axis.dim >= call.ndim - 2:
        return call.mixed(SOLVES)
    return several(call, axis)


@rule("aten._fft_c2c", "aten._fft_c2r", "aten._fft_r2c", "prims.fft_c2c", "prims.fft_r2c")
def fft(call: Call) -> Value:
    """Transform some dims."""
    if call.x.dim in call.dims(call["dim"]):
        return call.mixed("transforms along the batch axis")
    return call.x
