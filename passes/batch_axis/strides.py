"""`as_strided`: the batch index is a digit of the memory address, and must stay one.

Address ``f`` belongs to sample ``(f // step) % B`` where ``step`` is the stride of the batch
axis. A dim of stride ``s`` and size ``n`` holds that digit if, beside what ``find_digit`` asks,
the other dims never carry into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from flashnorm_compile._torch import shape_exprs, size_expr
from flashnorm_compile.passes.batch_axis.call import Call
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.sizes import product, quotient, same, surely_less
from flashnorm_compile.passes.batch_axis.values import Batched, Value
from flashnorm_compile.passes.batch_axis.views import SCRAMBLES, find_digit


@rule("aten.as_strided", "aten.as_strided_copy", "prims.as_strided")
def as_strided(call: Call) -> Value:
    """Read the storage with other strides."""
    source, view = _layout(call.first), _view(call)
    if not _within(source, view):
        return call.mixed(SCRAMBLES)
    digit = _digit(call, call.x, source)
    found = find_digit(*digit, view.strides, view.sizes)
    if found is None or not _holds(found.dim, view, digit):
        return call.mixed(SCRAMBLES)
    return found


@rule("aten.as_strided_scatter", "prims.as_strided_scatter", batched=None)
def as_strided_scatter(call: Call) -> Value:
    """Write to the storage with other strides."""
    target, update = call.value(call.first), call.value(call["src"])
    if not isinstance(update, Batched):
        return target  # constants at constant places
    storage, view = _layout(call.first), _view(call)
    digit = _digit(call, update, view)
    if not _within(storage, view) or not _holds(update.dim, view, digit):
        return call.mixed(SCRAMBLES)
    found = find_digit(*digit, storage.strides, storage.sizes)
    return call.mixed(SCRAMBLES) if found is None else call.join([target, found])


@dataclass(frozen=True)
class Layout:
    """Sizes, strides and offset of a tensor in its storage."""

    sizes: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...]
    offset: sympy.Expr


def _layout(node: fx.Node) -> Layout:
    val = node.meta["val"]
    offset = size_expr(val.storage_offset())
    return Layout(shape_exprs(val.shape), shape_exprs(val.stride()), offset)


def _view(call: Call) -> Layout:
    offset = call.get("storage_offset")
    return Layout(
        tuple(call.size(size) for size in call["size"]),
        tuple(call.size(stride) for stride in call["stride"]),
        call.size(0 if offset is None else offset),
    )


def _digit(call: Call, axis: Batched, layout: Layout) -> tuple[sympy.Expr, sympy.Expr]:
    """Return which digit of the address the sample is: its step and its period."""
    inner = product((layout.strides[axis.dim], axis.inner))
    return inner, product((inner, call.batch))


def _within(storage: Layout, view: Layout) -> bool:
    """Tell whether a view stays inside a tensor that fills its storage from the start."""
    reach = view.offset + _reach(view, range(len(view.sizes)))
    numel = product(storage.sizes)
    return (
        same(storage.offset, sympy.Integer(0))
        and is_dense(storage.sizes, storage.strides)
        and surely_less(sympy.expand(reach), numel)
    )


def _holds(dim: int, view: Layout, digit: tuple[sympy.Expr, sympy.Expr]) -> bool:
    """Tell whether all other dims step by whole periods, or stay below the dim's stride."""
    _, period = digit
    low = [
        other
        for other, stride in enumerate(view.strides)
        if other != dim and quotient(stride, period) is None
    ]
    return surely_less(sympy.expand(view.offset + _reach(view, low)), view.strides[dim])


def _reach(view: Layout, dims: Iterable[int]) -> sympy.Expr:
    return sympy.Add(*((view.sizes[dim] - 1) * view.strides[dim] for dim in dims))


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
