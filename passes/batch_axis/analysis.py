"""The driver: one pass over the graph, one rule per node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import sympy
import torch
from torch import fx

from flashnorm_compile._torch import shape_exprs, size_expr
from flashnorm_compile.passes.batch_axis import registry
from flashnorm_compile.passes.batch_axis.call import Call, nodes_in, shape_of
from flashnorm_compile.passes.batch_axis.registry import Entry
from flashnorm_compile.passes.batch_axis.sized import COUNTS, SizedConstants
from flashnorm_compile.passes.batch_axis.sizes import depends_on_data, product, same
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Mixed, Value
from flashnorm_compile.passes.batch_axis.writes import REPLACES_STORAGE, Writes


@dataclass(frozen=True)
class Analysis:
    """What every node of a graph (its output node aside) is, seen from the batch axis."""

    values: Mapping[fx.Node, Value]
    batch_size: sympy.Expr

    def __getitem__(self, node: fx.Node) -> Value:
        return self.values[node]


def analyze(
    graph: fx.Graph,
    seeds: Mapping[fx.Node, Value],
    batch_size: int | torch.SymInt,
    tangent_of: Mapping[fx.Node, fx.Node] | None = None,
) -> Analysis:
    """Find the batch axis of every node.

    Args:
        graph: A graph of ATen ops with example values in ``node.meta["val"]``.
        seeds: What each placeholder is.
        batch_size: The number of samples B, at least 2.
        tangent_of: The forward output that each tangent placeholder is the gradient of. A
            tangent is what its output is; that of a mixed output with one element, the loss,
            is constant.

    Raises:
        ValueError: If a placeholder has neither a seed nor an output.
    """
    driver = _Driver(seeds, size_expr(batch_size), tangent_of or {})
    for node in graph.nodes:
        driver.visit(node)
    for tangent in tangent_of or ():
        driver.resolve(tangent)
    return Analysis(driver.values, driver.batch)


class _Driver:
    def __init__(
        self,
        seeds: Mapping[fx.Node, Value],
        batch: sympy.Expr,
        tangent_of: Mapping[fx.Node, fx.Node],
    ):
        self.batch = batch
        self.values: dict[fx.Node, Value] = {}
        self._seeds = seeds
        self._tangent_of = tangent_of
        self._writes = Writes()
        self._constants = SizedConstants(batch, self.values)

    def visit(self, node: fx.Node) -> None:
        if node.op == "output":
            return
        if node.op == "placeholder":
            self._visit_placeholder(node)
        elif node.op == "get_attr":
            self.values[node] = Constant()
        elif node.op == "call_function":
            for argument in node.all_input_nodes:
                self.resolve(argument)
            value = _checked(node, self._call_value(node), self.batch)
            self.values[node] = value
            if not isinstance(value, Constant):
                self._writes.note(node)
        else:
            self.values[node] = Mixed(node, f"no batch-axis rule for {node.op} nodes")

    def resolve(self, tangent: fx.Node) -> None:
        """Give a tangent that is read for the first time the value of its output."""
        if tangent not in self.values and tangent in self._tangent_of:
            self.values[tangent] = self._tangent_value(tangent)

    def _visit_placeholder(self, node: fx.Node) -> None:
        if node in self._seeds:
            self.values[node] = self._seeds[node]
        elif node not in self._tangent_of:
            raise ValueError(
                f"no seed for placeholder {node.name}: the batch-axis analysis must be told "
                "whether it is constant or where its batch axis is"
            )

    def _tangent_value(self, tangent: fx.Node) -> Value:
        output = self._tangent_of[tangent]
        value = self.values.get(output)
        if value is None:
            return Mixed(tangent, "is read before the output that it is the gradient of")
        if isinstance(value, Mixed) and product(shape_of(output)) == 1:
            return Constant()
        return value

    def _call_value(self, node: fx.Node) -> Value:
        if node.target is getitem and isinstance(node.args[0], fx.Node):
            return _item(self._read(node, node.args[0]), node.args[1])
        if str(node.target).startswith(REPLACES_STORAGE):
            return Mixed(node, "replaces the storage of a tensor")
        entry = registry.find(node.target)
        call = Call(node, self.values, self.batch)
        values = [v for n in _inputs(call, entry, self.values) for v in _flat(self._read(node, n))]
        mixed = [value for value in values if isinstance(value, Mixed)]
        if mixed:
            # Samples that meet say more than constants that count them.
            return next((value for value in mixed if value.reason != COUNTS), mixed[0])
        if all(isinstance(value, Constant) for value in values):
            return self._constants.value(call, entry)
        if entry is None or "val" not in node.meta:
            return call.mixed(f"no batch-axis rule for {registry.op_name(node.target)}")
        return _stray_axis(call, entry) or entry.rule(call)

    def _read(self, reader: fx.Node, node: fx.Node) -> Value:
        if self._writes.is_stale(node):
            return Mixed(reader, f"reads {node.name} after it was overwritten in place")
        return self.values[node]


def _inputs(call: Call, entry: Entry | None, values: Mapping[fx.Node, Value]) -> list[fx.Node]:
    """Return the nodes whose values a call reads (not those of which only the shape matters)."""
    ignored = entry.ignores if entry is not None else frozenset()
    return [
        node
        for name, argument in call.args.items()
        for node in nodes_in(argument)
        if name not in ignored or _shape_depends_on_data(node)
    ]


def _shape_depends_on_data(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and depends_on_data(shape_exprs(val.shape))


def _stray_axis(call: Call, entry: Entry) -> Mixed | None:
    """Refuse a batch axis in an argument where the rule expects none."""
    if entry.batched is None:
        return None
    for position, (name, argument) in enumerate(call.args.items()):
        allowed = name in entry.batched or (position == 0 and entry.batched == registry.FIRST)
        if allowed or name in entry.ignores:
            continue
        if any(not isinstance(call.value(node), Constant) for node in nodes_in(argument)):
            op = registry.op_name(call.node.target)
            return call.mixed(f"no batch-axis rule for {op} where its {name} has a batch axis")
    return None


def _item(value: Value, index: Any) -> Value:
    return value[index] if isinstance(value, tuple) else value


def _flat(value: Value) -> Iterator[Constant | Batched | Mixed]:
    if isinstance(value, tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _checked(node: fx.Node, value: Value, batch: sympy.Expr) -> Value:
    """Refuse a claim that does not fit the example value: a safety net under the rules."""
    if isinstance(value, (Constant, Mixed)) or _fits(value, node.meta.get("val"), batch):
        return value
    return Mixed(node, "no consistent batch axis in the result")


def _fits(value: Value, val: Any, batch: sympy.Expr) -> bool:
    if isinstance(value, tuple):
        return (
            isinstance(val, (list, tuple))
            and len(val) == len(value)
            and all(_fits(v, e, batch) for v, e in zip(value, val, strict=True))
        )
    if not isinstance(value, Batched):
        return True
    if not isinstance(val, torch.Tensor) or not 0 <= value.dim < val.dim():
        return False
    return same(size_expr(val.shape[value.dim]), product((value.outer, batch, value.inner)))
