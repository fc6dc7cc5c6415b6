"""Advanced indexing: `x[i, j]` and writes to `x[i, j]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flashnorm_compile.passes.batch_axis.call import Call, shape_of
from flashnorm_compile.passes.batch_axis.ranges import identity_axis
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Mixed, Value

GATHERS = "gathers across samples"
ACCUMULATES = "accumulates over the batch axis"
WRITES = "writes across samples"
DATA_SHAPE = "its shape depends on the data of the samples"


@dataclass(frozen=True)
class Layout:
    """Where dims go in ``x[indices]``.

    The indices broadcast together; their dims stand where they are in ``x`` if they are
    neighbours, else in front of all others.

    Attributes:
        start: The first dim of the result that comes from the indices.
        width: How many there are.
        kept: For each dim of ``x`` that is not indexed, its dim in the result.
    """

    start: int
    width: int
    kept: dict[int, int]

    @property
    def ndim(self) -> int:
        """The number of dims of the result."""
        return self.width + len(self.kept)


def layout_of(ndim: int, indices: list[fx.Node | None]) -> Layout:
    """Lay out the result of indexing a tensor of ``ndim`` dims."""
    indexed = [dim for dim, index in enumerate(indices) if index is not None]
    width = max(index.meta["val"].dim() for index in indices if index is not None)
    neighbours = indexed == list(range(indexed[0], indexed[0] + len(indexed)))
    start = indexed[0] if neighbours else 0
    rest = [dim for dim in range(ndim) if dim not in indexed]
    kept = {dim: i if i < start else i + width for i, dim in enumerate(rest)}
    return Layout(start, width, kept)


def _masks(indices: list[fx.Node | None]) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(index is not None and index.meta["val"].dtype in masks for index in indices)


def _placed(axis: Batched, index: fx.Node, layout: Layout) -> Batched:
    """Put the batch axis of an index at its dim of the result."""
    return axis.at(layout.start + layout.width - index.meta["val"].dim() + axis.dim)


def _index_axes(
    call: Call, indices: list[fx.Node | None], layout: Layout
) -> list[Constant | Batched | Mixed]:
    found: list[Constant | Batched | Mixed] = []
    for index in indices:
        value = call.value(index)
        if index is not None and isinstance(value, Batched):
            value = _placed(value, index, layout)
        found.append(value)
    return found


def gathered(
    call: Call, source: fx.Node, indices: list[fx.Node | None]
) -> Constant | Batched | Mixed:
    """Return the value of ``source[indices]``."""
    if _masks(indices):
        return call.mixed(DATA_SHAPE)
    layout = layout_of(source.meta["val"].dim(), indices)
    axes = _index_axes(call, indices, layout)
    axis = call.value(source)
    if isinstance(axis, Batched):
        if axis.dim in layout.kept:
            return call.join([*axes, axis.at(layout.kept[axis.dim])])
        index = indices[axis.dim]
        assert index is not None
        own = identity_axis(index, axis, shape_of(source)[axis.dim], call)
        if own is None:
            return call.mixed(GATHERS)
        axis = _placed(own, index, layout)
    return call.join([*axes, axis])


def written(
    call: Call, target: fx.Node, indices: list[fx.Node | None], sources: list[Any], reason: str
) -> Constant | Batched | Mixed:
    """Return the value of ``target`` after a write to ``target[indices]``.

    Args:
        call: The call.
        target: What is written to.
        indices: The indices.
        sources: Tensors that broadcast to the shape of ``target[indices]``.
        reason: What to say if samples meet.
    """
    if _masks(indices):
        return call.mixed(DATA_SHAPE)
    layout = layout_of(target.meta["val"].dim(), indices)
    axes = _index_axes(call, indices, layout)
    region = call.join([*axes, *(call.aligned(source, layout.ndim) for source in sources)])
    if isinstance(region, Mixed):
        return region
    if isinstance(region, Constant):
        return call.value(target)  # constants at constant places
    dim = _written_dim(call, target, indices, layout, region)
    return call.mixed(reason) if dim is None else call.join([call.value(target), region.at(dim)])


def _written_dim(
    call: Call,
    target: fx.Node,
    indices: list[fx.Node | None],
    layout: Layout,
    region: Batched,
) -> int | None:
    """Find the dim of the target where each sample writes to its own slice only."""
    for dim, place in layout.kept.items():
        if place == region.dim:
            return dim
    shape = shape_of(target)
    for dim, index in enumerate(indices):
        if index is None or not isinstance(call.value(index), Constant):
            continue
        own = identity_axis(index, region, shape[dim], call)
        if own is not None and _placed(own, index, layout).dim == region.dim:
            # An index may count along a merged dim; the place says which sample writes.
            return dim if _placed(own, index, layout) == region else None
    return None


def _indices(call: Call) -> list[fx.Node | None]:
    return list(call["indices"])


@rule("aten.index", "aten._unsafe_index", batched=None)
def index(call: Call) -> Value:
    """Read self[indices]."""
    return gathered(call, call["self"], _indices(call))


@rule("aten._unsafe_masked_index", batched=None)
def masked_index(call: Call) -> Value:
    """Read self[indices], or the filling value where a mask is off."""
    read = gathered(call, call["self"], _indices(call))
    return call.join([read, call.aligned(call["mask"], len(call.out_shape))])


@rule(
    "aten.index_put",
    "aten.index_put_",
    "aten._unsafe_index_put",
    "aten._index_put_impl",
    "aten._index_put_impl_",
    "prims._unsafe_index_put_",
    batched=None,
)
def index_put(call: Call) -> Value:
    """Write to self[indices], or add to it."""
    reason = ACCUMULATES if call["accumulate"] else WRITES
    return written(call, call["self"], _indices(call), [call["values"]], reason)


@rule("aten._unsafe_masked_index_put_accumulate", batched=None)
def masked_index_put(call: Call) -> Value:
    """Add to self[indices] where a mask is on."""
    sources = [call["mask"], call["values"]]
    return written(call, call["self"], _indices(call), sources, ACCUMULATES)


@rule("aten.index_select", batched=None)
def index_select(call: Call) -> Value:
    """Read entries of one dim."""
    if call["index"].meta["val"].dim() != 1:
        return call.mixed(GATHERS)
    return gathered(call, call["self"], [None] * call.dim(call["dim"]) + [call["index"]])


@rule("aten.index_add", "aten.index_copy", "aten.index_reduce", batched=("self", "source"))
def index_add(call: Call) -> Value:
    """Add to, or overwrite, entries of one dim; both tensors have the same dims."""
    source, index = call["source"], call["index"]
    if source.meta["val"].dim() != call.ndim or index.meta["val"].dim() != 1:
        return call.mixed(WRITES)
    indices = [None] * call.dim(call["dim"]) + [index]
    return written(call, call["self"], indices, [source], ACCUMULATES)


@rule("aten.index_fill")
def index_fill(call: Call) -> Value:
    """Write one number to constant places."""
    return call.x


@rule("aten.take", batched=("index",))
def take(call: Call) -> Value:
    """Read entries of a flattened constant."""
    return call.value(call["index"])


@rule("aten.embedding", batched=None)
def embedding(call: Call) -> Value:
    """Read rows of a table."""
    return gathered(call, call["weight"], [call["indices"]])


@rule("aten.embedding_dense_backward", batched=None)
def embedding_dense_backward(call: Call) -> Value:
    """Add every token's gradient to its row of the table."""
    gradient = call.value(call["grad_output"])
    last = call["grad_output"].meta["val"].dim() - 1
    on_features = isinstance(gradient, Batched) and gradient.dim == last
    if on_features and isinstance(call.value(call["indices"]), Constant):
        assert isinstance(gradient, Batched)
        return gradient.at(1)
    return call.mixed(ACCUMULATES)


@rule(
    "aten.nonzero",
    "aten.nonzero_static",
    "aten.argwhere",
    "aten.masked_select",
    "aten.where.default",
    "aten._unique",
    "aten._unique2",
    "aten.unique_dim",
    "aten.unique_consecutive",
    "aten.repeat_interleave.Tensor",
    "aten.repeat_interleave.self_Tensor",
    "aten.bincount",
    batched=None,
)
def data_dependent(call: Call) -> Value:
    """Return as many entries as the data say."""
    return call.mixed(DATA_SHAPE)
