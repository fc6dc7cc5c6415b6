"""Where the number of samples B enters a value: a gradient may hold it as the loss's 1/B alone.

B itself is sensitive: it tells whether a sample is there. With a symbolic B every value is
``factor(B)`` times something that no B enters, or depends on B in another way; the backward is
linear, so the factor that the loss gives its samples reaches every gradient, and is undone there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import sympy
import torch
from torch import fx

from flashnorm_compile._torch import number_expr, shape_exprs
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.passes.batch_axis import ranges, registry
from flashnorm_compile.passes.batch_axis.analysis import Analysis
from flashnorm_compile.passes.batch_axis.call import bind_arguments, nodes_in
from flashnorm_compile.passes.batch_axis.sizes import product, same
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Mixed
from flashnorm_compile.passes.gradient_sites import ParameterGradient, place_of
from flashnorm_compile.passes.homogeneity import (
    COMPARISONS,
    FILLS,
    LINEAR,
    MOVES,
    PRODUCTS,
    SHAPES,
)
from flashnorm_compile.passes.joint import JointGraph

_ONE = sympy.Integer(1)


@dataclass(frozen=True)
class Scaled:
    """``factor`` times a value that no B enters; ``origin`` is where B came in.

    ``zero``: the value is 0, which any factor fits.
    """

    factor: sympy.Expr = _ONE
    origin: fx.Node | None = None
    zero: bool = False


@dataclass(frozen=True)
class Sized:
    """Depends on B in another way."""

    origin: fx.Node
    reason: str


@dataclass(frozen=True)
class Position:
    """Counts the samples: 0, 1, ...; good for an index that picks each sample itself."""

    origin: fx.Node


Scale = Scaled | Sized | Position

_COUNTS = "depends on the number of samples in the batch"
_PLACES = "depends on a sample's position in the batch"

class Scales:
    """The scale of every node that samples have not been added up for."""

    def __init__(self, joint: JointGraph, analysis: Analysis, *, mean: bool) -> None:
        self.analysis = analysis
        self.batch = analysis.batch_size
        self._symbols = self.batch.free_symbols
        self._values: dict[fx.Node, Scale] = {}
        for tangent, output in joint.tangents.items():
            # The loss is made outside, by the caller, who says how.
            outside = mean and isinstance(analysis.values.get(output), Batched)
            self._values[tangent] = Scaled(1 / self.batch if outside else _ONE, tangent)
        for node in joint.graph.nodes:
            if node.op != "output":
                self.of(node)

    def of(self, node: fx.Node) -> Scale:
        """Return the scale of a node."""
        if node not in self._values:
            self._values[node] = self._visit(node)
        return self._values[node]

    def is_free(self, node: fx.Node) -> bool:
        """Tell whether no B enters a node."""
        scale = self.of(node)
        return isinstance(scale, Scaled) and scale.factor == 1

    def _visit(self, node: fx.Node) -> Scale:
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._of_number(val, node)
        if node.op != "call_function":
            return Scaled()
        if node.target is getitem:
            return self.of(node.args[0])  # type: ignore[arg-type]
        arguments = self._arguments(node)
        found = self._of_call(node, arguments)
        if isinstance(found, Scaled) and not found.zero and self._is_wide(val):
            return Sized(node, "has a second dim as large as the batch")
        return found

    def _arguments(self, node: fx.Node) -> dict[str, list[Scale]]:
        """The scales of what a call computes with, by the argument's name."""
        entry = registry.find(node.target)
        ignored = entry.ignores if entry is not None else frozenset()
        return {
            name: [self._scale_of(item, node) for item in _leaves(argument)]
            for name, argument in bind_arguments(node).items()
            if name not in ignored and name not in SHAPES
        }

    def _scale_of(self, item: Any, node: fx.Node) -> Scale:
        if isinstance(item, fx.Node):
            scale = self.of(item)
            if isinstance(scale, Position) or isinstance(item.meta.get("val"), torch.Tensor):
                return scale
            # A number has no line of its own in the user's code.
            return replace(scale, origin=node)
        if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._of_number(item, node)
        # Zero and infinity are what they are with any positive factor.
        return Scaled(zero=not isinstance(item, bool) and (item == 0 or math.isinf(item)))

    def _of_call(self, node: fx.Node, arguments: dict[str, list[Scale]]) -> Scale:
        name = _short_name(node.target)
        scales = [scale for group in arguments.values() for scale in group]
        if name == "randperm" and self._holds_batch(shape_exprs(node.meta["val"].shape)):
            return Sized(node, _PLACES)
        if name in ("arange", "iota") and self._holds_batch(shape_exprs(node.meta["val"].shape)):
            return Position(node)
        positions = [scale for scale in scales if isinstance(scale, Position)]
        if positions:
            if registry.op_name(node.target) in ranges.MOVES:
                return positions[0]
            if not self._picks_itself(node, name):
                return Sized(positions[0].origin, _PLACES)
            scales = [scale for scale in scales if not isinstance(scale, Position)]
            arguments = {
                key: [scale for scale in group if not isinstance(scale, Position)]
                for key, group in arguments.items()
            }
        sized = next((scale for scale in scales if isinstance(scale, Sized)), None)
        if sized is not None:
            return sized
        if (cut := self._cuts_by_size(node)) is not None:
            return cut
        if name in FILLS:
            return self._filled(node, name, arguments)
        reduced = self._reduced(node, name)
        linear = [scale for scale in scales if isinstance(scale, Scaled)]
        if all(scale.factor == 1 for scale in linear) and reduced == 1:
            return Scaled(zero=self._is_zero(node, name, arguments))
        found = self._of_scaled(node, name, arguments)
        if isinstance(found, Scaled) and reduced != 1:
            return Scaled(self._cancel(found.factor * reduced), found.origin or node, found.zero)
        return found

    def _is_zero(self, node: fx.Node, name: str, arguments: dict[str, list[Any]]) -> bool:
        """Tell whether a call without B gives zeros, which go with any factor."""
        if name in PRODUCTS:
            addends, factors = (
                [scale.zero for key in keys for scale in arguments.get(key, ())]
                for keys in PRODUCTS[name]
            )
            return all(addends) and any(factors)
        if name == "copy":
            return all(scale.zero for scale in arguments["src"])
        tensors = [self.of(arg) for arg in node.all_input_nodes]
        moved = name in LINEAR or _moves(node) or name == "expand"
        zeros = all(isinstance(scale, Scaled) and scale.zero for scale in tensors)
        return moved and bool(tensors) and zeros

    def _of_scaled(self, node: fx.Node, name: str, arguments: dict[str, list[Any]]) -> Scale:
        """A call on values of which some hold a factor of B."""
        everything = [scale for group in arguments.values() for scale in group]
        exact = bind_arguments(node).get("rounding_mode") is None
        if name in ("div", "true_divide") and exact:
            (over,), (under,) = list(arguments.values())[:2]
            factor = self._cancel(over.factor / under.factor)
            origin = over.origin if over.factor != 1 else under.origin
            return Scaled(factor, origin or node, over.zero)
        if name in COMPARISONS:
            return self._compared(node, everything)
        if name == "reciprocal":
            return Scaled(self._cancel(1 / everything[0].factor), everything[0].origin)
        addends: Iterable[str]
        if name in PRODUCTS:
            addends, factors = PRODUCTS[name]
            result = self._times([s for key in factors for s in arguments.get(key, ())])
        elif name in LINEAR:
            addends, result = LINEAR[name], Scaled(zero=True)
        elif _moves(node):
            bound = bind_arguments(node)
            tensors = [key for key in arguments if any(True for _ in nodes_in(bound[key]))]
            addends, result = tensors, Scaled(zero=True)
        elif "_backward" in name:
            # grad_input_mask tells which gradients are wanted.
            addends = [key for key in arguments if key.startswith("grad") and "mask" not in key]
            result = Scaled(zero=True)
        else:
            return self._nonlinear(node, everything)
        used = {*addends, *(PRODUCTS[name][1] if name in PRODUCTS else ())}
        rest = [s for key, group in arguments.items() if key not in used for s in group]
        if any(scale.factor != 1 and not scale.zero for scale in rest):
            return self._nonlinear(node, rest)
        return self._plus(node, [*(s for key in addends for s in arguments.get(key, ())), result])

    def _compared(self, node: fx.Node, scales: list[Scaled]) -> Scale:
        """A comparison tells nothing of a positive factor that both sides have (0 has any)."""
        terms = [scale for scale in scales if not scale.zero]
        factor = terms[0].factor
        same_factor = all(self._cancel(term.factor / factor) == 1 for term in terms)
        return Scaled() if same_factor and factor.is_positive else self._nonlinear(node, terms)

    def _times(self, scales: list[Scaled]) -> Scaled:
        factor = self._cancel(product(scale.factor for scale in scales))
        origin = next((s.origin for s in scales if s.factor != 1), None)
        return Scaled(factor, origin, any(scale.zero for scale in scales))

    def _plus(self, node: fx.Node, scales: list[Scaled]) -> Scale:
        terms = [scale for scale in scales if not scale.zero]
        if not terms:
            return Scaled(zero=True)
        if all(self._cancel(term.factor / terms[0].factor) == 1 for term in terms):
            return terms[0]
        return self._nonlinear(node, terms)

    def _nonlinear(self, node: fx.Node, scales: list[Scaled]) -> Sized:
        origin = next(s.origin for s in scales if s.factor != 1 and s.origin is not None)
        return Sized(origin, f"{_COUNTS}, and as no mere factor after {node.target}")

    def _filled(self, node: fx.Node, name: str, arguments: dict[str, list[Any]]) -> Scaled:
        if "zeros" in name:
            return Scaled(zero=True)
        value = next((arguments[key][0] for key in ("fill_value", "s") if arguments.get(key)), None)
        if not isinstance(value, Scaled):
            return Scaled()
        return Scaled(value.factor, node if value.factor != 1 else None, value.zero)

    def _reduced(self, node: fx.Node, name: str) -> sympy.Expr:
        """The factor that a mean over samples, or a sum of the same for every sample, brings."""
        if name not in ("sum", "mean", "prod", "amax", "amin") or not node.all_input_nodes:
            return _ONE
        operand = node.all_input_nodes[0]
        sizes = [product(shape_exprs(x.meta["val"].shape)) for x in (operand, node)]
        if 0 in sizes:
            return _ONE
        count = self._part(sizes[0] / sizes[1])
        same_for_all = isinstance(self.analysis.values.get(operand), Constant)
        if name == "sum":
            return count if same_for_all else _ONE
        if name == "mean":
            return _ONE if same_for_all else 1 / count
        return _ONE

    def _cuts_by_size(self, node: fx.Node) -> Sized | None:
        """A range whose ends are counted in samples, of a dim that does not hold them."""
        bound = bind_arguments(node)
        if "dim" not in bound or not any(
            self._holds_batch([number_expr(end.meta["val"])])
            for key in ("start", "end", "step")
            for end in nodes_in(bound.get(key))
        ):
            return None
        value = self.analysis.values.get(node)
        dim = int(bound["dim"]) % max(node.meta["val"].dim(), 1)
        if isinstance(value, (Mixed, Batched)) and getattr(value, "dim", dim) == dim:
            return None
        return Sized(node, _COUNTS)

    def _picks_itself(self, node: fx.Node, name: str) -> bool:
        """Whether every index that counts the samples counts all that lies along its dim."""
        bound = bind_arguments(node)
        if name in ("index", "_unsafe_index", "index_put", "_unsafe_index_put",
                    "_unsafe_masked_index", "_unsafe_masked_index_put_accumulate"):  # fmt: skip
            indices = list(bound["indices"])
            target = bound["self"]
        elif name in ("index_select", "index_add"):
            target = bound["self"]
            dim = int(bound["dim"]) % target.meta["val"].dim()
            indices = [None] * dim + [bound["index"]]
        elif name == "embedding":
            target, indices = bound["weight"], [bound["indices"]]
        else:
            return False
        others = [x for x in node.all_input_nodes if x not in indices]
        if any(isinstance(self.of(other), Position) for other in others):
            return False
        shape = shape_exprs(target.meta["val"].shape)
        return all(
            same(shape[dim], shape_exprs(position.origin.meta["val"].shape)[0])
            for dim, index in enumerate(indices)
            if index is not None and isinstance(position := self.of(index), Position)
        )

    def _of_number(self, value: Any, node: fx.Node) -> Scale:
        expression = number_expr(value)
        if not self._holds_batch([expression]):
            return Scaled()
        if isinstance(value, torch.SymBool):
            return Sized(node, _COUNTS)
        return Scaled(self._part(expression), node)

    def _part(self, expression: sympy.Expr) -> sympy.Expr:
        """The factor of an expression that holds B."""
        expression = sympy.factor(expression)
        return self._cancel(expression.as_independent(*self._symbols, as_Add=False)[1])

    def _cancel(self, factor: sympy.Expr) -> sympy.Expr:
        return factor if factor == 1 else sympy.cancel(factor)

    def _holds_batch(self, sizes: Iterable[Any]) -> bool:
        return any(self._symbols & size.free_symbols for size in sizes)

    def _is_wide(self, val: Any) -> bool:
        """Whether a tensor holds B more than once."""
        if not isinstance(val, torch.Tensor):
            return False
        sizes = [size for size in shape_exprs(val.shape) if self._holds_batch([size])]
        return bool(sizes) and self._holds_batch([sympy.cancel(product(sizes) / self.batch)])


def check_batch_size(
    scales: Scales, gradients: list[ParameterGradient], analysis: Analysis, *, mean: bool
) -> None:
    """Check that B enters every gradient as the declared reduction's factor, and nowhere else.

    Raises:
        PrivacyError: a gradient depends on the number of samples, or a sample's position.
    """
    own = 1 / analysis.batch_size if mean else _ONE
    for gradient in gradients:
        for site in gradient.sites:
            _require(scales.of(site.node), own, gradient.name, site.node, analysis, mean=mean)
        for node in (gradient.output, *gradient.tail):
            for arg in (node, *node.all_input_nodes):
                if isinstance(analysis[arg], Constant):
                    _require(scales.of(arg), _ONE, gradient.name, arg, analysis, mean=mean)


def _require(
    scale: Scale,
    factor: sympy.Expr,
    name: str,
    node: fx.Node,
    analysis: Analysis,
    *,
    mean: bool,
) -> None:
    if isinstance(scale, Scaled) and (scale.zero or sympy.cancel(scale.factor / factor) == 1):
        return
    if isinstance(scale, Scaled):
        origin = scale.origin or node
        declared, reduce = ("mean", ".mean()") if mean else ("sum", ".sum()")
        raise PrivacyError(
            f'The loss is declared loss_reduction="{declared}", but it does not reduce over '
            f"samples like that: in a batch of B = {analysis.batch_size} samples, each sample's "
            f"own part of the gradient of {name} has the factor {scale.factor}, expected "
            f"{factor}. {place_of(origin)} A sample's weight would depend on how many others there "
            f"are. Use {reduce} over the batch, normalise by each sample's own count, or declare "
            "the other reduction."
        )
    origin = scale.origin
    what = scale.reason if isinstance(scale, Sized) else _PLACES
    raise PrivacyError(
        f"The gradient of {name} {_COUNTS}: {origin.target} {what}. {place_of(origin)} "
        "Whether a sample is there must not show in the gradients of the others. Use the batch "
        "size in the loss's mean alone; elsewhere use a constant, such as the expected batch size, "
        "and pass weights per sample as part of the batch."
    )


def _short_name(target: Any) -> str:
    """Return an op's name without namespace and overload: "add"."""
    if not hasattr(target, "_schema"):
        return str(getattr(target, "__name__", target))
    return target._schema.name.partition("::")[2]


def _moves(node: fx.Node) -> bool:
    entry = registry.find(node.target)
    return entry is not None and entry.rule.__module__.rpartition(".")[2] in MOVES


def _leaves(argument: Any) -> list[Any]:
    if isinstance(argument, (list, tuple)):
        return [leaf for item in argument for leaf in _leaves(item)]
    numbers = (fx.Node, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return [argument] if isinstance(argument, numbers) else []
