"""Gather, scatter and their kind: an index per entry, along one dim."""

from __future__ import annotations

from flashnorm_compile.passes.batch_axis.call import Call, shape_of
from flashnorm_compile.passes.batch_axis.indexing import ACCUMULATES, GATHERS, WRITES
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.sizes import same
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Value

POSITIONS = "meets constants by its position in the batch"


def _same_ndim(call: Call, *names: str) -> bool:
    nodes = [call[name] for name in names if call.get(name) is not None]
    return len({node.meta["val"].dim() for node in nodes}) == 1


@rule("aten.gather", batched=None)
def gather(call: Call) -> Value:
    """out[.., i, ..] = self[.., index[.., i, ..], ..]; all other dims stay in place."""
    if not _same_ndim(call, "self", "index"):
        return call.mixed(GATHERS)
    source = call.value(call["self"])
    axis = call.join([source, call.value(call["index"])])
    if not isinstance(axis, Batched):
        return axis
    if axis.dim == call.dim(call["dim"]):
        return axis if isinstance(source, Constant) else call.mixed(GATHERS)
    if same(call.out_shape[axis.dim], call.shape[axis.dim]):
        return axis
    return call.mixed(POSITIONS if isinstance(source, Constant) else "takes some of the samples")


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce", batched=None)
def scatter(call: Call) -> Value:
    """self[.., index[.., i, ..], ..] = src[.., i, ..]; all other dims stay in place."""
    src = call.get("src")
    names = ("self", "index", "src") if src is not None else ("self", "index")
    if not _same_ndim(call, *names):
        return call.mixed(WRITES)
    update = call.join([call.value(call["index"]), call.value(src)])
    axis = call.join([call.value(call["self"]), update])
    if not isinstance(axis, Batched):
        return axis
    if axis.dim == call.dim(call["dim"]):
        return call.mixed(WRITES if "add" not in str(call.node.target) else ACCUMULATES)
    sizes = [shape_of(node)[axis.dim] for node in (call["index"], src) if node is not None]
    whole = all(same(call.shape[axis.dim], size) for size in sizes)
    return axis if whole else call.mixed(POSITIONS if isinstance(update, Constant) else WRITES)


@rule("aten.masked_scatter")
def masked_scatter(call: Call) -> Value:
    """Where a constant mask is on, writes constants (else samples would share a queue)."""
    return call.aligned(call["self"], len(call.out_shape))


@rule("aten.bucketize")
def bucketize(call: Call) -> Value:
    """Look every entry up in constant boundaries."""
    return call.x


@rule("aten.searchsorted", batched=None)
def searchsorted(call: Call) -> Value:
    """Look entries up in a sorted sequence: the same for all, or one per row."""
    sequence = call["sorted_sequence"]
    axes = [call.value(n) for n in (sequence, call.get("sorter")) if n is not None]
    last = sequence.meta["val"].dim() - 1
    if any(isinstance(axis, Batched) and axis.dim == last for axis in axes):
        return call.mixed("searches across samples")
    return call.join([*axes, call.value(call["self"])])


@rule("aten.one_hot")
def one_hot(call: Call) -> Value:
    """Add a last dim."""
    return call.x


@rule("aten.multinomial")
def multinomial(call: Call) -> Value:
    """Draw from each row."""
    return call.mixed("draws among samples") if call.x.dim == call.ndim - 1 else call.x
