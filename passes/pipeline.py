"""The passes in order: what turns a joint graph into a private one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from flashnorm_compile._torch import size_expr, source_location
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.passes.batch_axis import Batched, Constant, Mixed, Value, analyze
from flashnorm_compile.passes.batch_axis.analysis import Analysis
from flashnorm_compile.passes.batch_size import Scales, check_batch_size
from flashnorm_compile.passes.effects import refuse_effects
from flashnorm_compile.passes.emit import Emitter
from flashnorm_compile.passes.gradient_sites import ParameterGradient, find_gradient_sites
from flashnorm_compile.passes.joint import JointGraph, no_loss, read_joint_graph
from flashnorm_compile.passes.loss import Ancestry, check_reduction, unreduce_normalisers
from flashnorm_compile.passes.norms import Norms, insert_norms
from flashnorm_compile.passes.one_sample import one_sample
from flashnorm_compile.passes.plan import Plan, make_plan
from flashnorm_compile.passes.release import insert_clipping, insert_release
from flashnorm_compile.passes.sites import Context
from flashnorm_compile.passes.trilinear import replace_trilinear


@dataclass(frozen=True)
class Request:
    """What the rewrite needs to know about the inputs of Dynamo's graph.

    Attributes:
        parameters: input index → name, for inputs that get a gradient.
        batch_dims: input index → batch dim, for batch inputs.
        names: input index → name, for all inputs.
        batch_size: B ≥ 1, a number or symbolic.
        probe, key, scalars: indices of the appended inputs: [B] float32, whose gradient carries
            the norms out; int64 (seed, release); float32 (C, σC, 1/E).
        loss_reduction: "mean" or "sum".
        strategy: "auto", "materialize", "ghost" or "flash".
        kernels: "library", "fused" (those of this package) or "auto".
        graphs: whether kernels are replayed as CUDA graphs.
        memory_budget: bytes that may be kept until clipping; None is no limit.
        loss_outside: whether outputs with a batch axis may get gradients from outside.
    """

    parameters: dict[int, str]
    batch_dims: dict[int, int]
    names: dict[int, str]
    batch_size: int | torch.SymInt
    probe: int
    key: int
    scalars: int
    loss_reduction: str = "mean"
    strategy: str = "auto"
    kernels: str = "library"
    graphs: bool = False
    memory_budget: float | None = None
    loss_outside: bool = False


@dataclass
class Report:
    """What the rewrite did, for people."""

    plan: Plan = field(default_factory=lambda: Plan(()))
    joint: str = ""


def make_private(graph: fx.Graph, request: Request) -> Report | None:
    """Rewrite a joint graph in place so that every gradient it returns is private.

    Returns:
        What was decided; None for a graph without a backward, which is left alone.

    Raises:
        PrivacyError: samples mix, or the graph is not understood. The graph must not be used.
    """
    joint = read_joint_graph(graph)
    if joint is None:
        return None
    if replace_trilinear(graph):
        joint = read_joint_graph(graph)
        assert joint is not None
    _check_gradients(joint, request)
    # Nothing of the probe's own backward is needed; its gradient will be the norms.
    joint.replace_gradient(request.probe, joint.inputs[request.probe])
    graph.eliminate_dead_code()
    if not _private_gradients(joint, request):
        return None
    size = size_expr(request.batch_size)
    if size == 1:
        tainted = _taint(joint, request)
        refuse_effects(graph, tainted)
        refuse_state_writes(joint, tainted, request)
        plan = one_sample(joint, request)
    else:
        plan = _rewrite(joint, request)
    graph.eliminate_dead_code()
    graph.lint()
    return Report(plan, graph.owning_module.print_readable(print_output=False))


def _rewrite(joint: JointGraph, request: Request) -> Plan:
    mean = request.loss_reduction == "mean"
    emit = Emitter(joint.graph)
    batch = joint.inputs[request.probe]
    analysis = _analyze(joint, request)
    ancestry = Ancestry.of(joint, set(request.parameters))
    check_reduction(joint, analysis, ancestry, mean=mean)
    varies = not analysis.batch_size.is_number
    scales = Scales(joint, analysis, mean=mean) if varies else None
    if unreduce_normalisers(joint, analysis, ancestry, emit, batch, mean=mean, scales=scales):
        analysis = _analyze(joint, request)
        scales = Scales(joint, analysis, mean=mean) if varies else None
    refuse_effects(joint.graph, analysis.values)
    refuse_state_writes(joint, analysis.values, request)
    if scales is not None:
        _refuse_batch_size_in_state(joint, scales, request)
    losses, zeros = _checked_tangents(joint, analysis, request)

    kernels = "fused" if request.strategy == "flash" else request.kernels
    context = Context(emit, analysis, batch, kernels, request.graphs)
    gradients = find_gradient_sites(joint, analysis, context, _private_gradients(joint, request))
    if scales is not None:
        check_batch_size(scales, gradients, analysis, mean=mean)
    plan = make_plan(gradients, request.strategy, request.memory_budget)
    scale = _insert_scale(emit, batch, _first_backward_node(joint, gradients), mean=mean)
    norms = insert_norms(gradients, plan, context, scale)
    _insert_release(joint, request, gradients, norms, scale, losses, zeros, context)
    return plan


def _insert_release(
    joint: JointGraph,
    request: Request,
    gradients: list[ParameterGradient],
    norms: Norms,
    scale: fx.Node,
    losses: list[fx.Node],
    zeros: list[fx.Node],
    context: Context,
) -> None:
    key, scalars = joint.inputs[request.key], joint.inputs[request.scalars]
    norm, weights = insert_clipping(
        norms, scale, scalars, losses, zeros, context, joint.output_node
    )
    insert_release(joint, gradients, norms, weights, key, scalars, context)
    joint.replace_gradient(request.probe, norm)


def _analyze(joint: JointGraph, request: Request) -> Analysis:
    return analyze(joint.graph, _seeds(joint, request), request.batch_size, joint.tangents)


def _seeds(joint: JointGraph, request: Request) -> dict[fx.Node, Value]:
    constants = (*joint.inputs.values(), *joint.tokens)
    seeds: dict[fx.Node, Value] = {node: Constant() for node in constants}
    for index, dim in request.batch_dims.items():
        if index in joint.inputs:
            seeds[joint.inputs[index]] = Batched(dim)
    return seeds


def _checked_tangents(
    joint: JointGraph, analysis: Analysis, request: Request
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Split the tangents that are checked at run time: scalar losses, and all other outputs."""
    losses: list[fx.Node] = []
    others: list[fx.Node] = []
    for tangent, output in joint.tangents.items():
        outside = request.loss_outside and isinstance(analysis[output], Batched)
        if outside or not tangent.users:
            continue
        # A loss's tangent is 1 (or 0 when it is not differentiated): a factor from outside could
        # depend on the samples.
        one_number = all(size_expr(size) == 1 for size in tangent.meta["val"].shape)
        (losses if one_number else others).append(tangent)
    if others and not losses:
        raise PrivacyError(no_loss(others, request.batch_size))
    return losses, others


def _private_gradients(joint: JointGraph, request: Request) -> dict[int, str]:
    return {index: name for index, name in request.parameters.items() if index in joint.gradients}


def _check_gradients(joint: JointGraph, request: Request) -> None:
    for index in joint.gradients:
        if index not in request.parameters and index != request.probe:
            name = request.names.get(index, f"input {index}")
            raise PrivacyError(
                f"The step computes a gradient for {name}, which is no parameter; it would leave "
                "the step as it is. Detach it."
            )


def refuse_state_writes(joint: JointGraph, values: dict[fx.Node, Value], request: Request) -> None:
    """Refuse to write what depends on samples into buffers or other inputs."""
    for index, written in joint.state_writes.items():
        value = values[written]
        if isinstance(value, Constant):
            continue
        origin = value.origin if isinstance(value, Mixed) else written
        location = source_location(written) or source_location(origin)
        name = request.names.get(index, f"input {index}")
        raise PrivacyError(
            f"The step writes a value that depends on samples into {name}; it would carry data "
            f"out without noise ({written.target}, at {location}). Keep no such state: use a "
            "layer without running statistics (GroupNorm, LayerNorm) or put the layer in eval "
            "mode."
        )


def _refuse_batch_size_in_state(joint: JointGraph, scales: Scales, request: Request) -> None:
    for index, written in joint.state_writes.items():
        if not scales.is_free(written):
            name = request.names.get(index, f"input {index}")
            raise PrivacyError(
                f"The step writes a value that depends on the number of samples into {name}; how "
                "many there are is private too, and would be read off it without noise "
                f"({source_location(written)}). Count with the expected batch size."
            )


def _taint(joint: JointGraph, request: Request) -> dict[fx.Node, Value]:
    """Mark everything that is computed from a batch input."""
    values: dict[fx.Node, Value] = {}
    batch = {joint.inputs[index] for index in request.batch_dims if index in joint.inputs}
    batch |= set(joint.tangents)
    for node in joint.graph.nodes:
        depends = node in batch or any(
            isinstance(values.get(arg), Mixed) for arg in node.all_input_nodes
        )
        values[node] = Mixed(node, "depends on a sample") if depends else Constant()
    return values


def _first_backward_node(joint: JointGraph, gradients: list[ParameterGradient]) -> fx.Node:
    first = joint.output_node
    for gradient in gradients:
        for node in (*(site.node for site in gradient.sites), gradient.output):
            first = min(first, node)
    return first


def _insert_scale(emit: Emitter, batch: fx.Node, before: fx.Node, *, mean: bool) -> fx.Node:
    """Insert what turns the graph's share of a sample into the gradient of its own loss."""

    def code(batch: torch.Tensor) -> torch.Tensor:
        return batch.new_full((), batch.shape[0] if mean else 1.0)

    return emit(code, batch, before=before)
