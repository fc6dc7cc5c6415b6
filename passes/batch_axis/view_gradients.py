"""Gradients of slices and the like, and writes to slices."""

from __future__ import annotations

from flashnorm_compile.passes.batch_axis.call import Call, shape_of
from flashnorm_compile.passes.batch_axis.indexing import WRITES
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.sizes import same
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Value


@rule("aten.slice_backward")
def slice_backward(call: Call) -> Value:
    """Put the gradient in the range that was taken; zeros around it."""
    axis = call.x
    if call.dim(call["dim"]) != axis.dim or _whole(call, call.shape, call.out_shape):
        return axis
    return call.mixed(WRITES)


def _whole(call: Call, part: tuple, total: tuple) -> bool:
    dim = call.dim(call["dim"], len(total))
    return call["step"] == 1 and same(part[dim], total[dim])


@rule("aten.slice_scatter", batched=("self", "src"))
def slice_scatter(call: Call) -> Value:
    """Overwrite a range of a dim."""
    target, source = call.value(call["self"]), call.value(call["src"])
    if isinstance(source, Constant):
        return target  # constants at constant places
    if _whole(call, shape_of(call["src"]), call.out_shape):
        return source
    axis = call.join([target, source])
    if isinstance(axis, Batched) and axis.dim == call.dim(call["dim"]):
        return call.mixed(WRITES)
    return axis


@rule("aten.select_backward")
def select_backward(call: Call) -> Value:
    """Put the gradient at one entry of a new dim."""
    dim = call.dim(call["dim"], call.ndim + 1)
    return call.x.at(call.x.dim + (dim <= call.x.dim))


@rule("aten.select_scatter", batched=("self", "src"))
def select_scatter(call: Call) -> Value:
    """Overwrite one entry of a dim."""
    target, source = call.value(call["self"]), call.value(call["src"])
    if isinstance(source, Batched):
        source = source.at(source.dim + (call.dim(call["dim"]) <= source.dim))
    return call.join([target, source])


@rule("aten.unfold_backward")
def unfold_backward(call: Call) -> Value:
    """Add up windows (the last dim) over a dim."""
    if call.x.dim in (call.dim(call["dim"], call.ndim - 1), call.ndim - 1):
        return call.mixed("adds up windows over the batch axis")
    return call.x


@rule("aten.diag_embed")
def diag_embed(call: Call) -> Value:
    """Spread the last dim over the diagonal of two dims."""
    out_ndim = len(call.out_shape)
    plane = {call.dim(call["dim1"], out_ndim), call.dim(call["dim2"], out_ndim)}
    return _spread(call, plane)


@rule("aten.diagonal_backward")
def diagonal_backward(call: Call) -> Value:
    """Put the gradient (last dim) on the diagonal of two dims."""
    return diag_embed(call)


def _spread(call: Call, plane: set[int]) -> Value:
    if call.x.dim == call.ndim - 1:
        return call.mixed("spreads the batch axis over a diagonal")
    rest = [dim for dim in range(len(call.out_shape)) if dim not in plane]
    return call.x.at(rest[call.x.dim])


@rule("aten.diagonal_scatter")
def diagonal_scatter(call: Call) -> Value:
    """Write constants to a diagonal."""
    return call.x
