"""`as_strided`: the batch index is a digit of the memory address, and must stay one."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from flashnorm_compile._torch import shape_exprs, size_expr
from flashnorm_compile.passes.batch_axis.call import Call
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.sizes import product, quotient, same, surely_less
from flashnorm_compile.passes.batch_axis.values import Value
from flashnorm_compile.passes.batch_axis.views import SCRAMBLES, find_digit


@rule("aten.as_strided", "aten.as_strided_copy", "prims.as_strided")
def as_strided(call: Call) -> Value:
    """Read the storage with other strides.

    Address ``f`` of a dense tensor belongs to sample ``(f // inner) % B``, where ``inner`` is
    the stride of the batch axis. An output dim of stride ``s`` and size ``n`` holds that digit
    if, beside what ``find_digit`` asks, the other dims never carry into it or out of it.
    """
    val = call.first.meta["val"]
    sizes, strides = shape_exprs(val.shape), shape_exprs(val.stride())
    if not is_dense(sizes, strides) or not same(size_expr(val.storage_offset()), sympy.Integer(0)):
        return call.mixed(SCRAMBLES)
    inner = product((strides[call.x.dim], call.x.inner))
    period = product((inner, call.batch))
    out_sizes = tuple(call.size(size) for size in call["size"])
    out_strides = tuple(call.size(stride) for stride in call["stride"])
    found = find_digit(inner, period, out_strides, out_sizes)
    offset = sympy.Integer(0)
    if call["storage_offset"] is not None:
        offset = call.size(call["storage_offset"])
    if found is None or not _no_carry(found.dim, out_sizes, out_strides, offset, period):
        return call.mixed(SCRAMBLES)
    return found


def is_dense(sizes: Sequence[sympy.Expr], strides: Sequence[sympy.Expr]) -> bool:
    """Tell whether a tensor fills its storage without gaps or overlaps, in any dim order."""
    left = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    step = sympy.Integer(1)
    while left:
        match = next((pair for pair in left if same(pair[1], step)), None)
        if match is None:
            return False
        left.remove(match)
        step = product((step, match[0]))
    return True


def _no_carry(
    dim: int,
    sizes: Sequence[sympy.Expr],
    strides: Sequence[sympy.Expr],
    offset: sympy.Expr,
    period: sympy.Expr,
) -> bool:
    """Tell whether all other dims step by whole periods, or stay below the dim's stride."""
    reach = offset
    for other, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        if other == dim or size == 1 or quotient(stride, period) is not None:
            continue
        reach += (size - 1) * stride
    return surely_less(sympy.expand(reach), strides[dim])
