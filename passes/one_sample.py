"""A batch of one sample, where nothing can mix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.passes.batch_axis.analysis import Analysis
from flashnorm_compile.passes.cost import Cost
from flashnorm_compile.passes.emit import Emitter
from flashnorm_compile.passes.joint import JointGraph, no_loss
from flashnorm_compile.passes.norms import Norms
from flashnorm_compile.passes.plan import Plan, Row
from flashnorm_compile.passes.release import insert_clipping, release_samples
from flashnorm_compile.passes.sites import Context
from flashnorm_compile.passes.sites.base import square_norm

if TYPE_CHECKING:
    from flashnorm_compile.passes.pipeline import Request


def one_sample(joint: JointGraph, request: Request) -> Plan:
    """With one sample the gradient is that sample's own."""
    context = _context(joint, request)
    before = joint.output_node
    indices = [index for index in request.parameters if index in joint.gradients]
    samples = {
        index: context.emit(lambda x: x.unsqueeze(0), joint.gradient(index), before=before)
        for index in indices
    }
    squares = [context.emit(square_norm, x, before=before) for x in samples.values()]
    scale = context.emit(lambda x: x.new_full((), 1.0), context.batch, before=before)
    scalars = joint.inputs[request.scalars]
    losses, zeros = _checked_tangents(joint, request)
    norm, weights = insert_clipping(
        Norms(squares, {}), scale, scalars, losses, zeros, context, before
    )
    release_samples(joint, samples, weights, joint.inputs[request.key], scalars, context)
    joint.replace_gradient(request.probe, norm)
    return _plan(joint, request)


def _checked_tangents(joint: JointGraph, request: Request) -> tuple[list[fx.Node], list[fx.Node]]:
    """Split the tangents that are checked at run time, as for more samples.

    With one sample it does not show which dim holds it: what may come from outside is whatever
    has a dim.
    """
    checked = [
        tangent
        for tangent in joint.tangents
        if tangent.users and not (request.loss_outside and tangent.meta["val"].ndim > 0)
    ]
    losses = [tangent for tangent in checked if tangent.meta["val"].numel() == 1]
    others = [tangent for tangent in checked if tangent not in losses]
    if others and not losses:
        raise PrivacyError(no_loss(others, 1))
    return losses, others


def _context(joint: JointGraph, request: Request) -> Context:
    return Context(Emitter(joint.graph), Analysis({}, 0), joint.inputs[request.probe])


def _plan(joint: JointGraph, request: Request) -> Plan:
    return Plan(
        tuple(
            Row(
                parameter=name,
                index=index,
                shape=tuple(int(size) for size in joint.inputs[index].meta["val"].shape),
                sites=(),
                source="",
                axis="",
                fused=False,
                choices=("materialize",),
                cost=Cost(),
            )
            for index, name in request.parameters.items()
            if index in joint.gradients
        )
    )
