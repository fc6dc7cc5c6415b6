"""From each gradient back to the nodes where the batch axis is contracted."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from flashnorm_compile._torch import source_location
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.passes.batch_axis.analysis import Analysis
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Mixed
from flashnorm_compile.passes.joint import JointGraph
from flashnorm_compile.passes.matrix_exp import match_derivative
from flashnorm_compile.passes.sites import Context, Site, site_at
from flashnorm_compile.passes.sites.generic import is_zero_fill

aten = torch.ops.aten
prims = torch.ops.prims

CASTS = {prims.convert_element_type.default, aten._to_copy.default}
# Linear, and the entries stay what they are, in row-major order.
_IN_ORDER = CASTS | {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
}
# Linear, and the norm stays as it is.
ISOMETRIES = _IN_ORDER | {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.neg.default,
}
# Linear in all their tensor arguments together; a constant argument makes them affine.
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default}
# Linear in the first argument, with constants for the others.
_LINEAR = {
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.mean.dim,
    aten.mean.default,
    aten.flip.default,
    prims.rev.default,
    aten.roll.default,
    aten.tril.default,
    aten.triu.default,
    aten.diagonal.default,
    aten.cumsum.default,
    aten.repeat.default,
    aten.as_strided.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.unfold.default,
    aten.div.Scalar,
    aten.mul.Scalar,
    operator.getitem,
}
# Linear in the argument at a position, with constants for the others.
_ONE_ARGUMENT: dict[Any, tuple[int, ...]] = {
    aten.div.Tensor: (0,),
    aten._weight_norm_interface_backward.default: (0,),
    aten.linalg_lu_solve.default: (2,),
    aten.linalg_solve_triangular.default: (1,),
}
# By name: Inductor registers its own primitive when it is first imported.
_FUSED = {"aten.addcmul.default", "prims.fma.default"}
_PRODUCTS = {aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.mv.default}
# (base, ..., values): linear in base and values together, with constant indices.
_WRITES: dict[Any, tuple[int, ...]] = {
    aten.index_put.default: (0, 2),
    aten.slice_scatter.default: (0, 1),
    aten.select_scatter.default: (0, 1),
    aten.scatter_add.default: (0, 3),
    aten.where.self: (1, 2),
    aten.embedding_dense_backward.default: (0,),
    aten._unsafe_masked_index_put_accumulate.default: (0, 3),
}


@dataclass
class ParameterGradient:
    """How one parameter's gradient is made.

    Attributes:
        index: the parameter's position among the graph's inputs.
        name: the user's name for it.
        output: the node of the gradient.
        sites: the nodes that contract the batch axis, in graph order.
        tail: the linear nodes from the sites to the output, in graph order.
        affine: whether the tail adds something that depends on no sample (a regulariser).
    """

    index: int
    name: str
    output: fx.Node
    sites: list[Site] = field(default_factory=list)
    tail: list[fx.Node] = field(default_factory=list)
    affine: bool = False

    def orientation(self, site: Site) -> bool | None:
        """Return whether the parameter's gradient is the site's, transposed; None if neither.

        Only a path of isometries and sums that keeps the sign, and keeps the shape or swaps the
        two dims, has one.
        """
        if self.affine:
            return None
        swapped = False
        node = site.node
        while node is not self.output:
            users = [user for user in node.users if user in self.tail]
            if len(users) != 1:
                return None
            (user,) = users
            if user.target in (aten.permute.default, aten.t.default, aten.transpose.int):
                ndim = user.meta["val"].ndim
                if ndim > 2:
                    return None
                swapped ^= ndim == 2 and _permutation(user) == [1, 0]
            elif user.target in ISOMETRIES - {aten.neg.default}:
                if user.meta["val"].shape != node.meta["val"].shape:
                    return None
            elif not _adds_once(user):
                return None
            node = user
        return swapped

    @property
    def isometric(self) -> bool:
        """Whether the site's norm is the parameter's: one site, and nothing but isometries."""
        return (
            len(self.sites) == 1
            and not self.affine
            and all(node.target in ISOMETRIES for node in self.tail)
        )


    @property
    def in_order(self) -> bool:
        """Whether the parameter's gradient is that of the one site, in another shape."""
        return self.isometric and all(node.target in _IN_ORDER for node in self.tail)


def _adds_once(node: fx.Node) -> bool:
    """Whether a node is the plain sum of two different ones of its shape."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    shape = node.meta["val"].shape
    return all(arg.meta["val"].shape == shape for arg in node.all_input_nodes)


def _permutation(node: fx.Node) -> list[int]:
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return [dim % 2 for dim in dims]
    return [1, 0]


def find_gradient_sites(
    joint: JointGraph, analysis: Analysis, context: Context, names: dict[int, str]
) -> list[ParameterGradient]:
    """Trace every gradient back to its sites.

    Raises:
        PrivacyError: samples mix on the way to a gradient.
    """
    found: dict[fx.Node, Site] = {}

    def site_for(node: fx.Node, name: str) -> Site:
        if node not in found:
            site = site_at(node, context)
            if site is None:
                raise PrivacyError(describe_mixing(analysis, [node], f"parameter {name}"))
            found[node] = site
        return found[node]

    order = {node: position for position, node in enumerate(joint.graph.nodes)}
    return [
        _trace_back(index, names[index], joint.gradient(index), analysis, site_for, order)
        for index in sorted(joint.gradients)
        if index in names
    ]


def _trace_back(
    index: int,
    name: str,
    output: fx.Node,
    analysis: Analysis,
    site_for: Callable[[fx.Node, str], Site],
    order: dict[fx.Node, int],
) -> ParameterGradient:
    gradient = ParameterGradient(index, name, output)
    tail: set[fx.Node] = set()
    sites: set[fx.Node] = set()
    blocks: set[fx.Node] = set()
    pending = [output]
    while pending:
        node = pending.pop()
        if node in tail or node in sites:
            continue
        value = analysis[node]
        if isinstance(value, Batched):
            raise PrivacyError(
                f"The gradient of parameter {name} has a row for every sample: the parameter "
                f"itself lies along the batch axis. {place_of(node)} Give it a shape without the "
                "batch."
            )
        if isinstance(value, Constant):
            gradient.affine = True
            continue
        if _contracts(node, analysis):
            sites.add(node)
            continue
        if (derivative := match_derivative(node, analysis)) is not None:
            tail |= derivative.nodes
            blocks |= derivative.nodes
            pending.append(derivative.direction)
            continue
        tail.add(node)
        pending.extend(_linear_arguments(node, name, analysis))
    gradient.sites = [site_for(node, name) for node in sorted(sites, key=order.__getitem__)]
    gradient.tail = sorted(tail, key=order.__getitem__)
    # Constants next to mixed values: zeros to write into stay linear, the rest is affine.
    affine = any(_adds_constant(node, analysis) for node in tail - blocks)
    gradient.affine = gradient.affine or affine
    return gradient


def _contracts(node: fx.Node, analysis: Analysis) -> bool:
    """Return whether samples first meet at this node."""
    operands = node.all_input_nodes
    if node.target is operator.getitem:
        operands = operands[0].all_input_nodes
    return all(not isinstance(analysis[operand], Mixed) for operand in operands)


def _linear_arguments(node: fx.Node, name: str, analysis: Analysis) -> list[fx.Node]:
    """Return the mixed arguments of a node that is linear in them, or refuse it."""
    mixed = [arg for arg in node.all_input_nodes if isinstance(analysis[arg], Mixed)]
    batched = [arg for arg in node.all_input_nodes if isinstance(analysis[arg], Batched)]
    target = node.target
    linear = (
        target in ISOMETRIES
        or target in _SUMS
        or (target in _LINEAR and mixed == [node.args[0]])
        or (target in _ONE_ARGUMENT and _only_in(node, mixed, _ONE_ARGUMENT[target]))
        or (target in _PRODUCTS and len(mixed) == 1 and node.args[0] is not node.args[1])
        or (str(target) in _FUSED and _linear_fma(node, analysis))
        or (target is aten.constant_pad_nd.default and _pads_with_zero(node))
        or (target in _WRITES and _only_in(node, mixed, _WRITES[target]))
    )
    if batched or not linear:
        raise PrivacyError(_describe_tail(node, analysis, mixed, batched, name))
    return mixed


def _linear_fma(node: fx.Node, analysis: Analysis) -> bool:
    """a·b + c (or c + v·a·b): linear in c, and in a or b but not both."""
    _, a, b = _fma_arguments(node)
    mixed = [isinstance(x, fx.Node) and isinstance(analysis[x], Mixed) for x in (a, b)]
    return not all(mixed)


def _fma_arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    if node.target is aten.addcmul.default:
        return node.args[0], node.args[1], node.args[2]
    return node.args[2], node.args[0], node.args[1]


def _describe_tail(
    node: fx.Node,
    analysis: Analysis,
    mixed: list[fx.Node],
    batched: list[fx.Node],
    name: str,
) -> str:
    """Say why a value made of sums over samples is no gradient that can be clipped."""
    text = describe_mixing(analysis, mixed, f"parameter {name}")
    if batched:
        return text
    return f"{text} (Further on, {node.target} is not known to be linear. {place_of(node)})"


def _pads_with_zero(node: fx.Node) -> bool:
    return len(node.args) < 3 or bool(node.args[2] == 0)


def _only_in(node: fx.Node, mixed: list[fx.Node], positions: tuple[int, ...]) -> bool:
    allowed = {node.args[position] for position in positions if position < len(node.args)}
    others = [arg for i, arg in enumerate(node.args) if i not in positions]
    elsewhere: list[fx.Node] = []
    fx.map_arg(others, elsewhere.append)
    return all(arg in allowed and arg not in elsewhere for arg in mixed)


def _adds_constant(node: fx.Node, analysis: Analysis) -> bool:
    if str(node.target) in _FUSED:
        c, a, b = _fma_arguments(node)
        if not isinstance(c, fx.Node):
            return c != 0
        products = [x for x in (a, b) if isinstance(x, fx.Node)]
        if all(isinstance(analysis[x], Constant) for x in products):
            return True
        return isinstance(analysis[c], Constant) and not is_zero_fill(c)
    if node.target in _SUMS:
        # The numbers of the others are dims.
        terms = node.args[:2] if node.target in (aten.add.Tensor, aten.sub.Tensor) else ()
        if any(isinstance(term, (int, float)) and term for term in terms):
            return True
        arguments = node.all_input_nodes
    elif node.target in _WRITES:
        arguments = [
            arg
            for position in _WRITES[node.target]
            if position < len(node.args) and isinstance(arg := node.args[position], fx.Node)
        ]
    else:
        return any(isinstance(arg, (int, float)) and arg for arg in _scalar_addend(node))
    return any(isinstance(analysis[arg], Constant) and not is_zero_fill(arg) for arg in arguments)


def _scalar_addend(node: fx.Node) -> tuple[Any, ...]:
    return node.args[1:2] if node.target in (aten.add.Scalar, aten.sub.Scalar) else ()


def describe_mixing(analysis: Analysis, nodes: list[fx.Node], what: str) -> str:
    """Say where samples met, and what to do about it."""
    value = next((v for node in nodes if isinstance(v := analysis[node], Mixed)), None)
    origin = nodes[0] if value is None else value.origin
    reason = "depends on several samples" if value is None else value.reason
    return (
        f"The gradient of {what} mixes samples: {origin.target} {reason}. {place_of(origin)} "
        "Differential privacy bounds what one sample can change, so no sample may depend on the "
        "others: compute it within each sample, for example group norm instead of batch norm, or "
        "statistics over features or time instead of over the batch."
    )


def place_of(node: fx.Node) -> str:
    """Say where a node comes from, as a sentence."""
    location = source_location(node)
    return f"It is at {location}." if location else f"(graph node {node.name})"
