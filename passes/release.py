"""Clipping factors, weighted gradients and noise: what leaves the backward."""

from __future__ import annotations

import torch
from torch import fx

from flashnorm_compile.kernels.noise import add_noise
from flashnorm_compile.passes.gradient_sites import ParameterGradient
from flashnorm_compile.passes.joint import JointGraph
from flashnorm_compile.passes.norms import Norms, run_tail, tail_constants
from flashnorm_compile.passes.sites import Context
from flashnorm_compile.passes.sites.generic import weighted_sum

EPSILON = 1e-6
# In place of a norm: the incoming gradient was not the loss's own (see ``clip``).
REFUSED = -1.0


def insert_clipping(
    norms: Norms, scale: fx.Node, scalars: fx.Node, losses: list[fx.Node], zeros: list[fx.Node],
    context: Context, before: fx.Node,
) -> tuple[fx.Node, fx.Node]:
    """Insert n_i and the weights c_i·scale.

    Args:
        norms: squared norms by parameter.
        scale: 0-d; g_i is ``scale`` times what the graph holds.
        scalars: float32 (C, σC, 1/E).
        losses: tangents of scalar losses, which must be 0 or 1.
        zeros: tangents of outputs that mix samples, which must be 0.
        context: what snippets need.
        before: where the code goes.

    Returns:
        [B] norms, and [B] weights that are 0 for samples that must not contribute. Where a
        tangent is not what it must be, all weights are 0 and all norms ``REFUSED``.
    """

    def code(scale: torch.Tensor, scalars: torch.Tensor, *rest: torch.Tensor) -> tuple:  # type: ignore[type-arg]
        squares = rest[: len(norms.squares)]
        one, none = rest[len(squares) : len(squares) + len(losses)], rest[len(squares) + len(losses) :]
        norm = scale * torch.stack([x.float() for x in squares]).sum(0).sqrt()
        factor = (scalars[0] / (norm + EPSILON)).clamp(max=1.0)
        zero = torch.zeros_like(factor)
        factor = torch.where(torch.isfinite(norm), factor, zero)
        for tangent in one:
            accepted = (tangent == 1) | (tangent == 0)
            factor = torch.where(accepted.all(), factor, zero)
            norm = torch.where(accepted.all(), norm, torch.full_like(norm, REFUSED))
        for tangent in none:
            accepted = (tangent == 0).all()
            factor = torch.where(accepted, factor, zero)
            norm = torch.where(accepted, norm, torch.full_like(norm, REFUSED))
        return norm, factor * scale

    norm, weights = context.emit(
        code, scale, scalars, *norms.squares, *losses, *zeros, before=before
    )
    return norm, weights


def insert_weighted_gradients(
    joint: JointGraph,
    gradients: list[ParameterGradient],
    norms: Norms,
    weights: fx.Node,
    context: Context,
) -> dict[int, fx.Node]:
    """Insert Σ_i c_i g_i for every parameter; returns them by input index."""
    before = joint.output_node
    sums: dict[int, fx.Node] = {}
    for gradient in gradients:
        samples = norms.per_sample.get(gradient.output)
        if samples is not None and gradient.output not in {s.node for s in gradient.sites}:
            sums[gradient.index] = context.emit(
                weighted_sum, samples, weights, before=before, like=gradient.output
            )
        else:
            sums[gradient.index] = _weighted_sites(gradient, norms, weights, context, before)
    return sums


def _weighted_sites(
    gradient: ParameterGradient, norms: Norms, weights: fx.Node, context: Context, before: fx.Node
) -> fx.Node:
    """Weigh the samples at the sites and run the rest of the path as it was."""
    sites = [
        site.weighted(weights, before)
        if (samples := norms.per_sample.get(site.node)) is None
        else context.emit(weighted_sum, samples, weights, before=before, like=site.node)
        for site in gradient.sites
    ]
    if not gradient.tail:
        return sites[0]

    def code(*values: torch.Tensor) -> torch.Tensor:
        return run_tail(gradient, values[: len(sites)], values[len(sites) :])

    return context.emit(
        code, *sites, *tail_constants(gradient), before=before, like=gradient.output
    )


def insert_noise(
    joint: JointGraph, sums: dict[int, fx.Node], key: fx.Node, scalars: fx.Node, context: Context
) -> None:
    """Return (Σ + σC·z)/E in place of every gradient, each with noise of its own stream."""
    for stream, index in enumerate(sorted(sums)):
        parameter = joint.inputs[index].meta["val"]

        def code(
            total: torch.Tensor,
            key: torch.Tensor,
            scalars: torch.Tensor,
            stream: int = stream,
            parameter: torch.Tensor = parameter,
        ) -> torch.Tensor:
            return add_noise(total, key, scalars, stream, parameter.dtype)

        joint.replace_gradient(
            index,
            context.emit(
                code,
                sums[index],
                key,
                scalars,
                before=joint.output_node,
                like=joint.gradient(index),
            ),
        )
