"""Constants with as many rows as there are samples.

A constant stays one where it is the same along every dim that holds the batch: filled, expanded,
computed entry by entry. Elsewhere its batch dim is followed as a sample's would be, so that what
differs from row to row, or counts the rows, is not taken for a constant.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from torch import fx

from flashnorm_compile._torch import shape_exprs
from flashnorm_compile.passes.batch_axis.call import Call, shape_of, tensor_arguments
from flashnorm_compile.passes.batch_axis.registry import Entry, op_name
from flashnorm_compile.passes.batch_axis.sizes import product, quotient, same
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Value

COUNTS = "depends on the number of samples in the batch"

_ENTRYWISE = ("pointwise", "constants")
# One number, or independent draws of one: the same along every dim, however it is viewed.
_FILLS = frozenset(
    {
        "aten.full", "aten.zeros", "aten.ones", "aten.empty", "aten.full_like",
        "aten.zeros_like", "aten.ones_like", "aten.empty_like", "aten.new_full",
        "aten.new_zeros", "aten.new_ones", "aten.new_empty", "aten.rand", "aten.randn",
        "aten.rand_like", "aten.randn_like", "aten.randint", "aten.randint_like",
        "aten.bernoulli", "aten.native_dropout", "aten.empty_strided", "aten.empty_permuted",
        "aten.new_empty_strided", "prims.full", "prims.full_like", "prims.empty_strided",
        "prims.inductor_random", "prims.inductor_randint",
    }
)  # fmt: skip
# These keep what is the same along a dim the same.
_KEEPS = frozenset(
    {
        "aten.expand", "aten.permute", "aten.transpose", "aten.t", "aten.unsqueeze",
        "aten.squeeze", "aten.slice", "aten.select", "aten.sum", "aten.mean", "aten.amax",
        "aten.amin", "aten.any", "aten.all", "aten.lift_fresh_copy", "prims.broadcast_in_dim",
        "prims.convert_element_type", "prims.device_put", "aten.clone", "aten.alias",
        "aten.detach", "aten._to_copy",
    }
)  # fmt: skip
# Fresh rows for new dims.
_ROWS = frozenset({"aten.expand", "aten.repeat", "prims.broadcast_in_dim"})
# What an index of them picks is for the rule of the indexing to say.
_RANGES = frozenset({"aten.arange", "prims.iota", "aten.randperm"})


class SizedConstants:
    """Tells what a call of constants is where the number of samples is symbolic."""

    def __init__(self, batch: sympy.Expr, values: Mapping[fx.Node, Value]) -> None:
        self.batch = batch
        self.values = values
        self._filled: set[fx.Node] = set()

    def value(self, call: Call, entry: Entry | None) -> Value:
        """Return the value of a call whose arguments are all constant."""
        if self.batch.is_number:
            return Constant()
        name = op_name(call.node.target).rpartition(".")[0]
        inputs = tensor_arguments(call)
        rows = [node for node in inputs if self._has_rows(node)]
        spreads = _is_entrywise(entry) or name in _KEEPS or _is_view(entry)
        filled = all(node in self._filled or _is_one(node) for node in inputs)
        if name in _FILLS or (spreads and filled):
            self._filled.add(call.node)
            return Constant()
        if not rows:
            made = name in _ROWS | _RANGES or not self._has_rows(call.node)
            return Constant() if made else call.mixed(COUNTS)
        if name in _KEEPS or _is_entrywise(entry):
            return Constant()
        followed: dict[fx.Node, Value] = dict(self.values)
        for node in rows:
            axis = self._axis(node)
            if axis is None:
                return call.mixed(COUNTS)
            followed[node] = axis
        if entry is None:
            return call.mixed(COUNTS)
        return entry.rule(Call(call.node, followed, self.batch))

    def _has_rows(self, node: fx.Node) -> bool:
        val = node.meta.get("val")
        outputs = val if isinstance(val, (list, tuple)) else [val]
        return any(
            self.batch.free_symbols & size.free_symbols
            for out in outputs
            if isinstance(out, torch.Tensor)
            for size in shape_exprs(out.shape)
        )

    def _axis(self, node: fx.Node) -> Batched | None:
        """The batch axis of a constant, if it has just one."""
        held = [
            (dim, size)
            for dim, size in enumerate(shape_of(node))
            if self.batch.free_symbols & size.free_symbols
        ]
        if len(held) != 1:
            return None
        dim, size = held[0]
        if same(size, self.batch):
            return Batched(dim)
        inner = quotient(size, self.batch)
        return None if inner is None else Batched(dim, inner=inner)


def _is_one(node: fx.Node) -> bool:
    return product(shape_of(node)) == 1


def _rule_file(entry: Entry | None) -> str:
    return "" if entry is None else entry.rule.__module__.rpartition(".")[2]


def _is_entrywise(entry: Entry | None) -> bool:
    return _rule_file(entry) in _ENTRYWISE


def _is_view(entry: Entry | None) -> bool:
    return _rule_file(entry) == "views"
