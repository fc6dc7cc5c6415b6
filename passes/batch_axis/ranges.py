"""Constants that count the samples: `x[arange(B), i]` stays on each sample's own slice."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from flashnorm_compile.passes.batch_axis.call import Call, shape_of
from flashnorm_compile.passes.batch_axis.registry import find, op_name
from flashnorm_compile.passes.batch_axis.sizes import same
from flashnorm_compile.passes.batch_axis.values import Batched

# Ops that move the entries of their first argument and leave them as they are.
MOVES = frozenset(
    {
        "aten.view.default",
        "aten._unsafe_view.default",
        "aten.reshape.default",
        "aten.unsqueeze.default",
        "aten.slice.Tensor",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.expand.default",
        "aten.permute.default",
        "aten.transpose.int",
        "aten.t.default",
        "aten.clone.default",
        "aten.alias.default",
        "aten.detach.default",
        "aten.lift_fresh_copy.default",
        "aten._to_copy.default",
        "prims.convert_element_type.default",
        "prims.device_put.default",
    }
)
_COUNTS = frozenset(
    {
        "aten.arange.default",
        "aten.arange.start",
        "aten.arange.start_step",
        "prims.iota.default",
    }
)


def identity_axis(index: fx.Node, axis: Batched, size: sympy.Expr, call: Call) -> Batched | None:
    """Find the dim of an index along which it counts 0, 1, ... up to a size.

    Args:
        index: An index into a dim that has a batch axis.
        axis: That batch axis.
        size: The size of that dim.
        call: The indexing call.

    Returns:
        The batch axis of the index's entries read as positions of that dim, or None.
    """
    moves: list[fx.Node] = []
    node = index
    while node.op == "call_function" and op_name(node.target) in MOVES and _is_integer(node):
        moves.append(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    if not _counts_to(node, size):
        return None
    found = axis.at(0)
    for move in reversed(moves):
        entry = find(move.target)
        value = entry.rule(Call(move, {node: found}, call.batch)) if entry else None
        if not isinstance(value, Batched):
            return None
        node, found = move, value
    return found


def _is_integer(node: fx.Node) -> bool:
    # Narrower types could wrap around.
    return node.meta["val"].dtype in (torch.int32, torch.int64)


def _counts_to(node: fx.Node, size: sympy.Expr) -> bool:
    if node.op != "call_function" or op_name(node.target) not in _COUNTS or not _is_integer(node):
        return False
    call = Call(node, {}, sympy.Integer(0))
    starts_at_zero = call.get("start") in (0, None)
    return starts_at_zero and call.get("step") in (1, None) and same(shape_of(node)[0], size)
