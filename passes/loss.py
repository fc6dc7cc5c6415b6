"""The loss's tail: normalisers that count the whole batch, and how the loss reduces over samples.

A token-mean loss divides by a count over the batch, so a sample's weight would depend on the
others. Where the count depends on no parameter and scales nothing but the gradient's seed, the
sample's own count takes its place.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from flashnorm_compile._torch import size_expr, source_location
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.passes.batch_axis.analysis import Analysis
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Mixed
from flashnorm_compile.passes.batch_size import Scales
from flashnorm_compile.passes.emit import Emitter
from flashnorm_compile.passes.joint import JointGraph
from flashnorm_compile.passes.layout import SampleAxis

aten = torch.ops.aten
prims = torch.ops.prims

_COUNTS = {aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim}
# 0-d arithmetic through which a count may reach the seed.
_SCALAR_OPERATIONS = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.mul.Scalar,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.maximum.default,
    aten.minimum.default,
    aten.reciprocal.default,
    aten.neg.default,
    aten.where.self,
    aten.eq.Scalar,
    aten.ne.Scalar,
    aten.gt.Scalar,
    aten.lt.Scalar,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.view.default,
    aten.reshape.default,
    prims.convert_element_type.default,
    aten._to_copy.default,
}
_SPREADS = {aten.expand.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default}


@dataclass(frozen=True)
class Ancestry:
    """What each node of a joint graph is computed from."""

    parameters: frozenset[fx.Node]
    tangents: frozenset[fx.Node]

    @classmethod
    def of(cls, joint: JointGraph, parameters: set[int]) -> Ancestry:
        """Mark the descendants of the trainable parameters and of the tangents."""
        roots = {node for index, node in joint.inputs.items() if index in parameters}
        return cls(
            frozenset(_descendants(joint.graph, roots)),
            frozenset(_descendants(joint.graph, set(joint.tangents))),
        )


def _descendants(graph: fx.Graph, roots: set[fx.Node]) -> set[fx.Node]:
    reached = set(roots)
    for node in graph.nodes:
        if any(arg in reached for arg in node.all_input_nodes):
            reached.add(node)
    return reached


def unreduce_normalisers(
    joint: JointGraph,
    analysis: Analysis,
    ancestry: Ancestry,
    emit: Emitter,
    batch: fx.Node,
    *,
    mean: bool,
    scales: Scales | None = None,
) -> bool:
    """Give each sample its own normaliser in the backward; the returned loss stays as it is.

    Args:
        joint: the joint graph, edited in place.
        analysis: its batch-axis analysis.
        ancestry: what depends on parameters and tangents.
        emit: splices code.
        batch: a [B] node.
        mean: whether gradients are scaled by B later on; the sample's own count needs no such
            factor, so it is taken out here.
        scales: how the values of the graph scale with B, where that is known.

    Returns:
        Whether anything changed (then the analysis must run again).
    """
    kinds = {term.averages for term in loss_terms(joint, analysis, ancestry) if term.normalised}
    if len(kinds) > 1 and scales is None:
        return False  # sums and means, each by a batch-wide count: refused as mixing
    # A normalised sum is the sample's own loss as it is; a normalised mean still holds 1/B.
    correct = mean and (scales is not None or kinds != {True})
    lifter = _Lifter(analysis, ancestry, emit, batch, correct=correct, scales=scales)
    for node in list(joint.graph.nodes):
        if lifter.is_count(node):
            lifter.lift_count(node)
    if not lifter.vectors:
        return False
    for node in list(joint.graph.nodes):
        lifter.visit(node)
    joint.graph.eliminate_dead_code()
    return lifter.changed


class _Lifter:
    """Carries each count's per-sample value [B] along the 0-d arithmetic that follows it.

    ``vectors`` maps a node whose value is one number (0-d, one element, or that number expanded)
    to the [B] node with each sample's own.
    """

    def __init__(
        self,
        analysis: Analysis,
        ancestry: Ancestry,
        emit: Emitter,
        batch: fx.Node,
        *,
        correct: bool,
        scales: Scales | None,
    ) -> None:
        self.analysis = analysis
        self.ancestry = ancestry
        self.emit = emit
        self.batch = batch
        self.correct = correct
        self.scales = scales
        self.vectors: dict[fx.Node, fx.Node] = {}
        self.changed = False

    def is_count(self, node: fx.Node) -> bool:
        """Return whether a node reduces a batched value, free of parameters, to one number."""
        if node.target not in _COUNTS or node in self.ancestry.tangents:
            return False
        if node in self.ancestry.parameters or not _is_one_number(node):
            return False
        operand = node.args[0]
        return isinstance(self.analysis[operand], Batched)

    def lift_count(self, node: fx.Node) -> None:
        axis = SampleAxis.of(self.analysis[node.args[0]])
        averages = node.target in (aten.mean.default, aten.mean.dim)
        dtype = node.meta["val"].dtype

        def code(x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            own = axis.to_front(x, batch.shape[0]).flatten(1)
            return own.mean(1, dtype=dtype) if averages else own.sum(1, dtype=dtype)

        self.vectors[node] = self.emit(code, node.args[0], self.batch, before=node.next, like=node)

    def visit(self, node: fx.Node) -> None:
        lifted = [arg for arg in node.all_input_nodes if arg in self.vectors]
        if not lifted or node in self.vectors:
            return
        others = [
            arg
            for arg in node.all_input_nodes
            if arg not in self.vectors and isinstance(arg.meta.get("val"), torch.Tensor)
        ]
        in_backward = node in self.ancestry.tangents
        if node in self.ancestry.parameters and not in_backward:
            return  # the loss itself: returned as the user wrote it
        if node.target in _SPREADS and in_backward and not others:
            self.vectors[node] = self.vectors[lifted[0]]
        elif node.target in _SCALAR_OPERATIONS and all(
            _is_one_number(arg) and isinstance(self.analysis[arg], Constant) for arg in others
        ):
            self.vectors[node] = self._repeat(node)
        elif in_backward:
            self._meet_samples(node, lifted, others)

    def _repeat(self, node: fx.Node) -> fx.Node:
        """Emit the same 0-d operation on [B] vectors."""
        if node.target in _SPREADS | {aten.squeeze.default, aten.squeeze.dims, aten.squeeze.dim}:
            (lifted,) = (arg for arg in node.all_input_nodes if arg in self.vectors)
            return self.vectors[lifted]
        arguments = node.all_input_nodes
        vectors = [self.vectors.get(arg, arg) for arg in arguments]
        flat = [arg not in self.vectors for arg in arguments]

        def code(*values: Any) -> Any:
            shaped = [
                v.reshape(()) if one and isinstance(v, torch.Tensor) else v
                for v, one in zip(values, flat, strict=True)
            ]
            substitution = dict(zip(arguments, shaped, strict=True))
            args = fx.map_arg(node.args, substitution.__getitem__)
            kwargs = fx.map_arg(node.kwargs, substitution.__getitem__)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        return self.emit(code, *vectors, before=node.next, like=node)

    def _meet_samples(self, node: fx.Node, lifted: list[fx.Node], others: list[fx.Node]) -> None:
        """Where the seed meets a batched value, put each sample's own number in its place."""
        if not _is_pointwise(node) or any(arg not in self.ancestry.tangents for arg in lifted):
            return  # stays mixed, and is refused if it reaches a gradient
        axis = self._axis_among(others)
        partner = next(
            (x for x in others if isinstance(self.analysis.values.get(x), Batched)), None
        )
        if axis is None:
            axis = self._axis_ahead(node)
        if axis is None or (partner is None and not axis.is_fixed):
            return
        arguments = node.all_input_nodes
        vectors = [self.vectors[arg] if arg in lifted else arg for arg in arguments]
        axis_known = axis
        sample_axis = None if partner is None else SampleAxis.of(self.analysis[partner])

        def code(correct: bool, *values: torch.Tensor) -> torch.Tensor:
            known = dict(zip(arguments, values, strict=True))

            def shape(vector: torch.Tensor) -> torch.Tensor:
                vector = _own_factor(vector, correct)
                if sample_axis is not None:
                    return sample_axis.spread(vector, known[partner])
                return axis_known.spread(vector)

            shaped = {
                arg: shape(x).to(arg.meta["val"].dtype)
                if arg in lifted
                else x
                for arg, x in zip(arguments, values, strict=True)
            }
            args = fx.map_arg(node.args, shaped.__getitem__)
            kwargs = fx.map_arg(node.kwargs, shaped.__getitem__)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        def emitted(*, correct: bool) -> fx.Node:
            given = functools.partial(code, correct)
            return self.emit(given, *vectors, before=node.next, like=node)

        own = emitted(correct=self.correct and self.scales is None)
        if self.correct and self.scales is not None and self.scales.is_free(own):
            own = emitted(correct=True)
        node.replace_all_uses_with(own)
        self.changed = True

    def _axis_among(self, arguments: list[fx.Node]) -> _TrailingAxis | None:
        """The batch axis that the batched arguments agree on."""
        axes = {
            _TrailingAxis(arg.meta["val"].ndim - value.dim, value.outer, value.inner)
            for arg in arguments
            if isinstance(value := self.analysis.values.get(arg), Batched)
        }
        return axes.pop() if len(axes) == 1 else None

    def _axis_ahead(self, node: fx.Node) -> _TrailingAxis | None:
        """The axis at which a value of the seed and constants meets the samples later on."""
        for user in node.users:
            if not _is_pointwise(user):
                continue
            axis = self._axis_among(user.all_input_nodes) or self._axis_ahead(user)
            if axis is not None:
                return axis
        return None


@dataclass(frozen=True)
class _TrailingAxis:
    """A batch axis counted from the end, as broadcasting does: 1 is the last dim."""

    position: int
    outer: sympy.Expr
    inner: sympy.Expr

    @property
    def is_fixed(self) -> bool:
        """Whether the axis lies between sizes that do not vary."""
        return bool(self.outer.is_Integer and self.inner.is_Integer)

    def spread(self, vector: torch.Tensor) -> torch.Tensor:
        """Shape a [B] vector to broadcast along the axis."""
        outer, inner = int(self.outer), int(self.inner)
        vector = vector.view(1, -1, 1).expand(outer, vector.shape[0], inner).reshape(-1)
        return vector.view(-1, *(1,) * (self.position - 1))


def _own_factor(vector: torch.Tensor, correct: bool) -> torch.Tensor:
    """Take 1/B out of a [B] factor if asked, and what is not finite to 0.

    A sample that counts nothing has no gradient; its own factor may be infinite.
    """
    if correct:
        vector = vector / vector.shape[0]
    return torch.where(torch.isfinite(vector), vector, torch.zeros_like(vector))


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in (
        prims.convert_element_type.default,
        aten._to_copy.default,
        aten.where.self,
    )


def _is_one_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return True
    return all(size_expr(size) == 1 for size in value.shape)


@dataclass(frozen=True)
class Term:
    """One reduction over samples in the loss: ``factor`` · reduce(batched), perhaps / count.

    Attributes:
        node: the reduction.
        averages: whether it is a mean.
        factor: the constant in front of the batched value, the mean's 1/size included.
        normalised: whether it is divided by a count that depends on the batch.
    """

    node: fx.Node
    averages: bool
    factor: sympy.Expr
    scaled: bool
    normalised: bool


def loss_terms(joint: JointGraph, analysis: Analysis, ancestry: Ancestry) -> list[Term]:
    """Follow each scalar loss back through its linear tail to the reductions over samples."""
    terms: list[Term] = []
    pending = [
        (output, sympy.Integer(1), False, False)
        for output in dict.fromkeys(joint.tangents.values())
        if isinstance(analysis[output], Mixed) and _is_one_number(output)
    ]
    while pending:
        node, factor, scaled, normalised = pending.pop()
        if not isinstance(analysis[node], Mixed):
            continue
        if node.target in _COUNTS and isinstance(analysis[node.args[0]], Batched):
            averages = node.target in (aten.mean.default, aten.mean.dim)
            if averages:
                factor = factor * _reduced_size(node)
            terms.append(Term(node, averages, factor, scaled, normalised))
            continue
        for arg in node.all_input_nodes:
            step = _factor(node, arg, analysis, ancestry)
            if step is not None:
                number, counts = step
                pending.append((arg, factor * number, scaled or number != 1, normalised or counts))
    return terms


def check_reduction(
    joint: JointGraph, analysis: Analysis, ancestry: Ancestry, *, mean: bool
) -> None:
    """Check the declared reduction against the loss.

    A loss that is declared a mean but is a sum would weigh a sample by the size of its batch.
    A batch size that the step fixes cannot be told from any other constant: such a step may only
    use a plain ``mean`` or ``sum``.

    Raises:
        PrivacyError: the declared reduction is not the loss's.
    """
    batch = analysis.batch_size
    for term in loss_terms(joint, analysis, ancestry):
        if term.normalised:
            continue  # each sample has its own count
        if batch.is_Integer:
            fits = term.averages == mean and not term.scaled
        else:
            scaled = sympy.simplify(term.factor * batch) if mean else term.factor
            # A number held in a tensor is followed by ``Scales``.
            fits = batch not in scaled.free_symbols or scaled.has(sympy.Dummy)
        if not fits:
            declared, other = ("mean", "sum") if mean else ("sum", "mean")
            if batch.is_Integer and term.scaled:
                raise PrivacyError(
                    f"The step is made for batches of {batch} samples only, so it cannot be seen "
                    f"whether the factor {term.factor} in the loss stands for their number. It is "
                    f"at {source_location(term.node)}. Use .{declared}() without a factor, or "
                    "write the step for any batch size: compare or broadcast nothing with a fixed "
                    "one."
                )
            raise PrivacyError(
                f'The loss is declared loss_reduction="{declared}", but it does not reduce over '
                f"samples like that: in a batch of {batch}, each sample's loss has the factor "
                f"{term.factor}. It is at {source_location(term.node)}. Declare "
                f'loss_reduction="{other}", or reduce with .{declared}() over the batch.'
            )


def _reduced_size(node: fx.Node) -> sympy.Expr:
    """1 / the number of elements that a mean averages."""
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return size_expr(after.numel()) / size_expr(before.numel())


def _factor(
    node: fx.Node, arg: fx.Node, analysis: Analysis, ancestry: Ancestry
) -> tuple[sympy.Expr, bool] | None:
    """How a node of the loss's tail scales one argument: (number, whether a count divides it)."""
    one = sympy.Integer(1)
    if node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        other = node.args[1] if node.args[0] is arg else node.args[0]
        divides = node.target in (aten.div.Tensor, aten.div.Scalar)
        if divides and node.args[0] is not arg:
            return None
        if isinstance(other, fx.Node) and isinstance(analysis[other], Mixed):
            # Only a count that no parameter moves leaves the loss linear.
            return None if other in ancestry.parameters else (one, True)
        number = _number(other)
        return (1 / number if divides else number), False
    if node.target in _COUNTS and not isinstance(analysis[arg], Batched):
        return one, False
    if node.target is aten.where.self and arg is node.args[0]:
        return None
    if node in ancestry.parameters and arg not in ancestry.parameters:
        return None  # an addend that no parameter moves has no gradient
    return one, False


def _number(value: Any) -> sympy.Expr:
    """A scalar as an expression; a symbol of its own for a tensor that no batch size enters."""
    if isinstance(value, fx.Node):
        if value.target is aten.scalar_tensor.default:
            return _number(value.args[0])
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt):
        return size_expr(value)
    if isinstance(value, torch.SymFloat):
        return value.node.expr
    if isinstance(value, (int, float)):
        return sympy.nsimplify(value, rational=True)
    return sympy.Dummy("constant", nonzero=True)
