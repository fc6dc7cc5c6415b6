"""Ops that move, cut, join or repeat dims without computing."""

from __future__ import annotations

import sympy

from flashnorm_compile._torch import size_expr
from flashnorm_compile.passes.batch_axis.call import Call, nodes_in, several, shape_of
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.sizes import product, quotient, same
from flashnorm_compile.passes.batch_axis.values import Batched, Value
from flashnorm_compile.passes.batch_axis.views import SCRAMBLES, reshape_axis

CUTS = "takes some of the samples"


@rule("aten.permute", "aten.permute_copy", "prims.transpose")
def permute(call: Call) -> Value:
    """Output dim i is input dim dims[i]."""
    return call.x.at(call.dims(call.get("dims", "permutation")).index(call.x.dim))


@rule("aten.transpose", "aten.transpose_copy", "aten.swapaxes", "aten.swapdims")
def transpose(call: Call) -> Value:
    """Swap two dims."""
    a, b = call.dim(call.get("dim0", "axis0")), call.dim(call.get("dim1", "axis1"))
    return call.x.at({a: b, b: a}.get(call.x.dim, call.x.dim))


@rule("aten.t", "aten.t_copy")
def t(call: Call) -> Value:
    """Swap the two dims of a matrix (a vector stays)."""
    return call.x.at(call.ndim - 1 - call.x.dim)


@rule("aten.movedim.int")
def movedim(call: Call) -> Value:
    """Take a dim out and puts it back elsewhere."""
    order = list(range(call.ndim))
    order.remove(source := call.dim(call["source"]))
    order.insert(call.dim(call["destination"]), source)
    return call.x.at(order.index(call.x.dim))


@rule("aten.expand", "aten.expand_copy", "aten.broadcast_to")
def expand(call: Call) -> Value:
    """Add dims in front and repeat dims of size 1, which the batch axis is not."""
    return call.x.at(call.x.dim + len(call.out_shape) - call.ndim)


@rule("prims.broadcast_in_dim")
def broadcast_in_dim(call: Call) -> Value:
    """Input dim i becomes output dim broadcast_dimensions[i]."""
    return call.x.at(call["broadcast_dimensions"][call.x.dim])


@rule("aten.select.int", "aten.select_copy.int")
def select(call: Call) -> Value:
    """Take one entry of a dim, which disappears."""
    dim = call.dim(call["dim"])
    if dim == call.x.dim:
        return call.mixed("takes one entry of the batch axis")
    return call.x.at(call.x.dim - (dim < call.x.dim))


@rule("aten.unbind", "aten.unbind_copy")
def unbind(call: Call) -> Value:
    """Take every entry of a dim, which disappears."""
    return several(call, select(call))


def cut(call: Call, start: sympy.Expr, size: sympy.Expr) -> Batched | None:
    """Cut a range out of the batch dim: whole rounds over all samples, or nothing."""
    axis = call.x
    one_round = product((call.batch, axis.inner))
    outer = quotient(size, one_round)
    if outer is None or outer == 0 or quotient(start, one_round) is None:
        return None
    return Batched(axis.dim, outer, axis.inner)


@rule("aten.slice.Tensor", "aten.slice_copy.Tensor")
def slice_(call: Call) -> Value:
    """Take a range of a dim."""
    axis, size = call.x, call.shape[call.x.dim]
    if call.dim(call["dim"]) != axis.dim:
        return axis
    out_size = call.out_shape[axis.dim]
    if call["step"] != 1:
        return call.mixed(CUTS)
    if same(size, out_size):
        return axis  # the full range, however start and end say it
    start = call.size(0 if call["start"] is None else call["start"])
    if start.is_nonnegative is not True:
        return call.mixed(CUTS)
    return cut(call, start, out_size) or call.mixed(CUTS)


@rule(
    "aten.split",
    "aten.split_copy",
    "aten.split_with_sizes",
    "aten.split_with_sizes_copy",
    "aten.unsafe_split",
    "aten.unsafe_split_with_sizes",
    "aten.chunk",
    "aten.unsafe_chunk",
    "aten.tensor_split",
)
def split(call: Call) -> Value:
    """Cut a dim into consecutive ranges."""
    dim = call.dim(call["dim"])
    if dim != call.x.dim:
        return several(call, call.x)
    pieces: list[Value] = []
    start: sympy.Expr = sympy.Integer(0)
    for out in call.outputs:
        size = size_expr(out.shape[dim])
        pieces.append(cut(call, start, size) or call.mixed(CUTS))
        start = sympy.expand(start + size)
    return tuple(pieces)


@rule("aten.cat", "aten.concat", "prims.cat", batched=None)
def cat(call: Call) -> Value:
    """Join tensors along a dim; along the batch dim, whole rounds over all samples."""
    # Old models join with an empty 1-d tensor, which cat skips.
    tensors = [n for n in nodes_in(call.first) if shape_of(n) != (0,)]
    ndim = len(call.out_shape)
    if any(node.meta["val"].dim() != ndim for node in tensors):
        return call.mixed("joins tensors of different dims")
    dim = call.dim(call["dim"], ndim)
    values = [call.value(node) for node in tensors]
    batched = [value for value in values if isinstance(value, Batched)]
    if all(value.dim != dim for value in batched):
        return call.join(values)
    if len(batched) < len(values):
        return call.mixed("joins other rows to the batch axis")
    inner = batched[0].inner
    if any(value.dim != dim or not same(value.inner, inner) for value in batched):
        return call.mixed("pairs different samples")
    outer = sympy.expand(sympy.Add(*(value.outer for value in batched)))
    return Batched(dim, outer, inner)


@rule("aten.stack", batched=None)
def stack(call: Call) -> Value:
    """Join tensors along a new dim."""
    dim = call.dim(call["dim"], len(call.out_shape))
    axis = call.join(call.value(node) for node in nodes_in(call.first))
    return axis.at(axis.dim + (dim <= axis.dim)) if isinstance(axis, Batched) else axis


@rule("aten.repeat", "aten.tile")
def repeat(call: Call) -> Value:
    """Repeat whole dims; new dims come in front."""
    dim = call.x.dim + len(call.out_shape) - call.ndim
    times = quotient(call.out_shape[dim], call.shape[call.x.dim])
    if times is None:
        return call.mixed("no batch-axis rule for this repetition")
    return Batched(dim, product((times, call.x.outer)), call.x.inner)


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Value:
    """Repeat each entry of a dim."""
    axis, shape = call.x, call.shape
    if call["dim"] is None:  # of the flattened tensor
        shape = (product(shape),)
        flat = reshape_axis(axis, call.shape, shape, call.batch)
        if flat is None:
            return call.mixed(SCRAMBLES)
        axis = flat
    elif call.dim(call["dim"]) != axis.dim:
        return axis
    times = quotient(call.out_shape[axis.dim], shape[axis.dim])
    if times is None:
        return call.mixed("no batch-axis rule for this repetition")
    return Batched(axis.dim, axis.outer, product((times, axis.inner)))


@rule("aten.constant_pad_nd", "aten.pad")
def pad(call: Call) -> Value:
    """Pad the last dims, two numbers for each, the last dim first."""
    position = 2 * (call.ndim - 1 - call.x.dim)
    widths = list(call["pad"])[position : position + 2]
    return call.mixed("pads the batch axis") if any(w != 0 for w in widths) else call.x


@rule(
    "aten.reflection_pad1d",
    "aten.reflection_pad2d",
    "aten.reflection_pad3d",
    "aten.replication_pad1d",
    "aten.replication_pad2d",
    "aten.replication_pad3d",
)
def pad_border(call: Call) -> Value:
    """Pad the last dims."""
    padded = len(call["padding"]) // 2
    return call.mixed("pads the batch axis") if call.x.dim >= call.ndim - padded else call.x


@rule("aten.flip", "prims.rev")
def flip(call: Call) -> Value:
    """Reverse dims."""
    gone = call.dims(call["dims"]) if call["dims"] else []
    return call.mixed("reverses the batch axis") if call.x.dim in gone else call.x


@rule("aten.roll")
def roll(call: Call) -> Value:
    """Rotate dims; without dims, the flattened tensor."""
    if call.x.dim in call.dims(call["dims"]):
        return call.mixed("rotates the batch axis")
    return call.x


@rule("aten.rot90")
def rot90(call: Call) -> Value:
    """Turn a plane of two dims."""
    if call.x.dim in call.dims(call["dims"]):
        return call.mixed("rotates the batch axis")
    return call.x


@rule("aten.diagonal", "aten.diagonal_copy")
def diagonal(call: Call) -> Value:
    """Two dims go; their diagonal becomes the last dim."""
    planes = [call.dim(call["dim1"]), call.dim(call["dim2"])]
    if call.x.dim in planes:
        return call.mixed("takes a diagonal of the batch axis")
    return call.x.at(call.x.dim - sum(dim < call.x.dim for dim in planes))


@rule("aten.unfold", "aten.unfold_copy")
def unfold(call: Call) -> Value:
    """Windows over a dim, which become a last dim."""
    if call.x.dim == call.dim(call["dimension"]):
        return call.mixed("takes windows over the batch axis")
    return call.x
