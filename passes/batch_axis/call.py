"""What a rule sees: one call in the graph, its arguments by name, and what they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from flashnorm_compile._torch import shape_exprs, size_expr
from flashnorm_compile.passes.batch_axis.sizes import product, same
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Mixed, Value


def nodes_in(argument: Any) -> Iterator[fx.Node]:
    """Yield the nodes in an argument (a node, or lists of nodes and constants)."""
    if isinstance(argument, fx.Node):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from nodes_in(item)
    elif isinstance(argument, dict):
        for item in argument.values():
            yield from nodes_in(item)


def bind_arguments(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by the names of the op's schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): arg for i, arg in enumerate(node.args)}, **node.kwargs}
    bound: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def shape_of(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """Return the shape of a node's tensor."""
    return shape_exprs(node.meta["val"].shape)


class Call:
    """One op call with the values of its arguments.

    Attributes:
        node: The call.
        batch: The number of samples B.
        args: The arguments by name.
    """

    def __init__(self, node: fx.Node, values: Mapping[fx.Node, Value], batch: sympy.Expr):
        self.node = node
        self.batch = batch
        self.args = bind_arguments(node)
        self._values = values

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def get(self, *names: str) -> Any:
        """Return the first of these arguments that the op has (overloads name them apart)."""
        return next((self.args[name] for name in names if name in self.args), None)

    def value(self, argument: Any) -> Constant | Batched | Mixed:
        """Return what an argument (a node, or a plain Python value) is."""
        if not isinstance(argument, fx.Node):
            return Constant()
        value = self._values[argument]
        return Mixed(argument, "several outputs used as one") if isinstance(value, tuple) else value

    @property
    def first(self) -> fx.Node:
        """The first argument."""
        return next(iter(self.args.values()))

    @property
    def x(self) -> Batched:
        """The batch axis of the first argument, for rules where only that one has it."""
        value = self.value(self.first)
        assert isinstance(value, Batched), f"{self.node}: its first argument has no batch axis"
        return value

    @property
    def shape(self) -> tuple[sympy.Expr, ...]:
        """The shape of the first argument."""
        return shape_of(self.first)

    @property
    def ndim(self) -> int:
        """The number of dims of the first argument."""
        return self.first.meta["val"].dim()

    @property
    def out_shape(self) -> tuple[sympy.Expr, ...]:
        """The shape of the (single) output."""
        return shape_of(self.node)

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The example outputs of an op with several."""
        val = self.node.meta["val"]
        return tuple(val) if isinstance(val, (list, tuple)) else (val,)

    def size(self, argument: int | fx.Node | torch.SymInt) -> sympy.Expr:
        """Return a size given as a number or as a node that computes one."""
        return size_expr(argument.meta["val"] if isinstance(argument, fx.Node) else argument)

    def dim(self, dim: Any, ndim: int | None = None) -> int:
        """Return a dim counted from the front (of the first argument unless told)."""
        return int(dim) % max(self.ndim if ndim is None else ndim, 1)

    def dims(self, dims: Any, ndim: int | None = None) -> list[int]:
        """Return dims counted from the front; None or an empty list means all of them."""
        total = self.ndim if ndim is None else ndim
        if dims is None or (isinstance(dims, (list, tuple)) and not dims):
            return list(range(total))
        return [self.dim(d, total) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]

    def mixed(self, reason: str) -> Mixed:
        """Return the verdict that samples meet in this call."""
        return Mixed(self.node, reason)

    def join(self, placed: Iterable[Constant | Batched | Mixed]) -> Constant | Batched | Mixed:
        """Join values given at their place in the output: they must agree on the batch axis."""
        result: Constant | Batched | Mixed = Constant()
        for value in placed:
            if isinstance(value, Mixed):
                return value
            if isinstance(value, Constant):
                continue
            if isinstance(result, Batched) and not same_axis(result, value):
                return self.mixed("pairs different samples")
            result = value
        return result

    def broadcast(self, nodes: Sequence[Any], ndim: int) -> Constant | Batched | Mixed:
        """Join arguments that broadcast (right-aligned) to ``ndim`` dims."""
        return self.join(self.aligned(node, ndim) for node in nodes)

    def aligned(self, node: Any, ndim: int) -> Constant | Batched | Mixed:
        """Return an argument's value with its dims right-aligned to ``ndim`` dims."""
        value = self.value(node)
        return (
            value.at(value.dim + ndim - node.meta["val"].dim())
            if isinstance(value, Batched)
            else value
        )


def same_axis(a: Batched, b: Batched) -> bool:
    """Tell whether two batch axes coincide."""
    return a.dim == b.dim and same(a.outer, b.outer) and same(a.inner, b.inner)


def several(call: Call, value: Constant | Batched | Mixed) -> Value:
    """Return the same value for every output (an empty one is constant)."""
    if isinstance(value, Mixed) or not isinstance(call.node.meta["val"], (list, tuple)):
        return value
    return tuple(Constant() if is_empty(out) else value for out in call.outputs)


def is_empty(out: Any) -> bool:
    """Tell whether an example output holds nothing: absent, or no entries."""
    return not isinstance(out, torch.Tensor) or product(shape_exprs(out.shape)) == 0


def tensor_arguments(call: Call) -> list[fx.Node]:
    """Return the arguments that are tensors."""
    nodes = nodes_in(list(call.args.values()))
    return [node for node in nodes if isinstance(node.meta["val"], torch.Tensor)]
