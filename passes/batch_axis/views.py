"""Reshapes: the batch index is a digit of the row-major index, and must stay one."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from flashnorm_compile.passes.batch_axis.call import Call
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.sizes import product, quotient, row_major_strides
from flashnorm_compile.passes.batch_axis.values import Batched, Value

SCRAMBLES = "scrambles the batch axis"


def reshape_axis(
    axis: Batched,
    shape: Sequence[sympy.Expr],
    out_shape: Sequence[sympy.Expr],
    batch: sympy.Expr,
) -> Batched | None:
    """Follow a batch axis through a reshape that keeps the row-major order.

    In the flat index, sample ``b`` is the digit in ``(o * B + b) * inner_flat + n``. A dim of
    stride ``s`` and size ``n`` holds exactly that digit if ``s`` divides ``inner_flat`` and
    ``inner_flat * B`` divides ``s * n``.

    Args:
        axis: The batch axis before.
        shape: The shape before.
        out_shape: The shape after.
        batch: The number of samples.

    Returns:
        The batch axis after, or None if the samples are scrambled.
    """
    inner_flat = product((axis.inner, *shape[axis.dim + 1 :]))
    period = product((inner_flat, batch))
    return find_digit(inner_flat, period, row_major_strides(out_shape), out_shape)


def find_digit(
    inner_flat: sympy.Expr,
    period: sympy.Expr,
    strides: Sequence[sympy.Expr],
    sizes: Sequence[sympy.Expr],
) -> Batched | None:
    """Find the dim that holds the digit between ``inner_flat`` and ``period``."""
    for dim, (stride, size) in enumerate(zip(strides, sizes, strict=True)):
        inner = quotient(inner_flat, stride)
        if inner is None:
            continue
        outer = quotient(product((stride, size)), period)
        if outer is not None and outer != 0:
            return Batched(dim, outer, inner)
    return None


@rule(
    "aten.view.default",
    "aten.view_copy.default",
    "aten._unsafe_view",
    "aten.reshape",
    "aten._reshape_copy",
    "aten._reshape_alias",
    "aten._reshape_alias_copy",
    "aten.squeeze",
    "aten.squeeze_copy",
    "aten.unsqueeze",
    "aten.unsqueeze_copy",
    "aten.flatten",
    "aten.unflatten",
    "aten.ravel",
    "aten.view_as",
    "prims.collapse",
    "prims.collapse_view",
    "prims.reshape",
    "prims.split_dim",
    "prims.squeeze",
)
def reshape(call: Call) -> Value:
    """All of these keep the row-major order."""
    axis = reshape_axis(call.x, call.shape, call.out_shape, call.batch)
    return axis or call.mixed(SCRAMBLES)


@rule("aten.view.dtype", "aten.view_copy.dtype", "prims.view_of_dtype")
def view_dtype(call: Call) -> Value:
    """Reinterpret bytes; entries of another width regroup the last dim."""
    same_width = call.first.meta["val"].element_size() == call.outputs[0].element_size()
    if call.x.dim == call.ndim - 1 and not same_width:
        return call.mixed(SCRAMBLES)
    return call.x


@rule("aten.view_as_real", "aten.view_as_real_copy")
def view_as_real(call: Call) -> Value:
    """Add a last dim."""
    return call.x


@rule("aten.view_as_complex", "aten.view_as_complex_copy")
def view_as_complex(call: Call) -> Value:
    """Take the last dim (size 2, real and imaginary) away."""
    return call.mixed(SCRAMBLES) if call.x.dim == call.ndim - 1 else call.x
