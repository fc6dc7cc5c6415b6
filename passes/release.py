"""Clipping factors, weighted gradients and noise: what leaves the backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from flashnorm_compile._torch import hint
from flashnorm_compile.kernels.release import release
from flashnorm_compile.passes.gradient_sites import ParameterGradient
from flashnorm_compile.passes.joint import JointGraph
from flashnorm_compile.passes.layout import laid_out, memory_order
from flashnorm_compile.passes.norms import Norms, run_tail, tail_constants
from flashnorm_compile.passes.sites import Context, Site
from flashnorm_compile.passes.sites.fused_matmul import FusedMatmulSite, weighted_together

EPSILON = 1e-6
# In place of a norm: the incoming gradient was not the loss's own (see ``clip``).
REFUSED = -1.0
# Of sums that wait for their noise, unless one alone takes more.
SUMS_BYTES = 2**28


def insert_clipping(
    norms: Norms,
    scale: fx.Node,
    scalars: fx.Node,
    losses: list[fx.Node],
    zeros: list[fx.Node],
    context: Context,
    before: fx.Node,
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
        one, none = (
            rest[len(squares) : len(squares) + len(losses)],
            rest[len(squares) + len(losses) :],
        )
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


def insert_release(
    joint: JointGraph,
    gradients: list[ParameterGradient],
    norms: Norms,
    weights: fx.Node,
    key: fx.Node,
    scalars: fx.Node,
    context: Context,
) -> None:
    """Return (Σ_i c_i g_i + σC·z)/E in place of every gradient, each with noise of its own stream.

    Per-sample gradients are summed, noised and scaled in one pass; sums that the sites make
    themselves are noised as a batch of one. Some gradients are released before the next are summed,
    so that not all sums are there beside what they become.
    """
    before = joint.output_node
    one = context.emit(lambda scalars: scalars.new_ones(1), scalars, before=before)
    sums: dict[Site, fx.Node] = {}
    stream = 0
    for some in _parts(joint, gradients):
        sums |= _sums_of_fused_sites(some, norms, sums, weights, before)
        pending: dict[tuple[torch.dtype, bool], list[tuple[int, fx.Node]]] = {}
        for gradient in some:
            samples = _samples_in_place(gradient, norms, context, before)
            value = samples or _weighted_sites(
                gradient, norms, sums, weights, key, scalars, context, before
            )
            dtype = joint.inputs[gradient.index].meta["val"].dtype
            pending.setdefault((dtype, samples is not None), []).append((gradient.index, value))
        for (dtype, per_sample), values in pending.items():
            if not per_sample:
                values = [(i, context.emit(_as_one, x, before=before)) for i, x in values]
            weighing = weights if per_sample else one
            _release(joint, values, weighing, key, scalars, stream, dtype, context)
            stream += len(values)


def _parts(
    joint: JointGraph, gradients: list[ParameterGradient]
) -> Iterator[list[ParameterGradient]]:
    """Cut the gradients into parts whose float32 sums take `SUMS_BYTES` at most."""
    part: list[ParameterGradient] = []
    size = 0
    for gradient in gradients:
        more = 4 * hint(joint.inputs[gradient.index].meta["val"].numel())
        if part and size + more > SUMS_BYTES:
            yield part
            part, size = [], 0
        part.append(gradient)
        size += more
    if part:
        yield part


def _as_one(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(0)


def release_samples(
    joint: JointGraph,
    samples: dict[int, fx.Node],
    weights: fx.Node,
    key: fx.Node,
    scalars: fx.Node,
    context: Context,
) -> None:
    """Release gradients whose per-sample values are known, by input index."""
    by_dtype: dict[torch.dtype, list[tuple[int, fx.Node]]] = {}
    for index, value in samples.items():
        by_dtype.setdefault(joint.inputs[index].meta["val"].dtype, []).append((index, value))
    stream = 0
    for dtype, values in by_dtype.items():
        _release(joint, values, weights, key, scalars, stream, dtype, context)
        stream += len(values)


def _release(
    joint: JointGraph,
    values: list[tuple[int, fx.Node]],
    weights: fx.Node,
    key: fx.Node,
    scalars: fx.Node,
    stream: int,
    dtype: torch.dtype,
    context: Context,
) -> None:
    def code(
        weights: torch.Tensor, key: torch.Tensor, scalars: torch.Tensor, *samples: torch.Tensor
    ) -> list[torch.Tensor]:
        return release(list(samples), weights, key, scalars, stream, dtype)

    nodes = context.emit(
        code, weights, key, scalars, *(value for _, value in values), before=joint.output_node
    )
    for (index, _), node in zip(values, nodes, strict=True):
        order = memory_order(joint.inputs[index].meta["val"])
        if order is not None:
            node = context.emit(laid_out, node, order, before=joint.output_node)
        joint.replace_gradient(index, node)


def _samples_in_place(
    gradient: ParameterGradient, norms: Norms, context: Context, before: fx.Node
) -> fx.Node | None:
    """The per-sample gradients, where they lie as the parameter does."""
    if (samples := norms.per_sample.get((gradient.index, gradient.output))) is not None:
        return samples
    if gradient.affine:
        raise AssertionError(f"{gradient.name}: its norm is not that of its own samples")
    if len(gradient.sites) != 1:
        return None
    samples = norms.per_sample.get((gradient.index, gradient.sites[0].node))
    if samples is None or gradient.orientation(gradient.sites[0]) is False:
        return samples
    if not gradient.in_order:
        return None
    shape = tuple(gradient.output.meta["val"].shape)
    return context.emit(  # type: ignore[no-any-return]
        lambda samples: samples.reshape(samples.shape[0], *shape), samples, before=before
    )


def _sum_over_samples(
    samples: fx.Node,
    weights: fx.Node,
    key: fx.Node,
    scalars: fx.Node,
    context: Context,
    before: fx.Node,
) -> fx.Node:
    """Σ_i weights[i]·samples[i]: a release without noise, in float32."""

    def code(
        samples: torch.Tensor, weights: torch.Tensor, key: torch.Tensor, scalars: torch.Tensor
    ) -> torch.Tensor:
        # (C, noise scale, 1/E) = (0, 0, 1)
        silent = torch.arange(3, device=scalars.device).eq(2).to(scalars.dtype)
        return release([samples], weights, key, silent, 0, torch.float32)[0]

    return context.emit(code, samples, weights, key, scalars, before=before, like=samples)


def _sums_of_fused_sites(
    gradients: list[ParameterGradient],
    norms: Norms,
    known: dict[Site, fx.Node],
    weights: fx.Node,
    before: fx.Node,
) -> dict[Site, fx.Node]:
    """Weigh the samples at those sites that share launches, unless their sums are known."""
    sites = [
        site
        for gradient in gradients
        for site in gradient.sites
        if isinstance(site, FusedMatmulSite)
        and site not in known
        and (gradient.index, site.node) not in norms.per_sample
        and (gradient.index, gradient.output) not in norms.per_sample
    ]
    return weighted_together(list(dict.fromkeys(sites)), weights, before)


def _weighted_sites(
    gradient: ParameterGradient,
    norms: Norms,
    sums: dict[Site, fx.Node],
    weights: fx.Node,
    key: fx.Node,
    scalars: fx.Node,
    context: Context,
    before: fx.Node,
) -> fx.Node:
    """Weigh the samples at the sites and run the rest of the path as it was."""

    def total(site: Site) -> fx.Node:
        if (samples := norms.per_sample.get((gradient.index, site.node))) is not None:
            return _sum_over_samples(samples, weights, key, scalars, context, before)
        return sums[site] if site in sums else site.weighted(weights, before)

    sites = [total(site) for site in gradient.sites]
    if not gradient.tail:
        return sites[0]

    def code(*values: torch.Tensor) -> torch.Tensor:
        return run_tail(gradient, values[: len(sites)], values[len(sites) :])

    return context.emit(
        code, *sites, *tail_constants(gradient), before=before, like=gradient.output
    )
