"""Per-sample squared norms of every parameter's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from flashnorm_compile.passes.gradient_sites import CASTS, ParameterGradient
from flashnorm_compile.passes.plan import Choice, Plan, pair
from flashnorm_compile.passes.sample_map import run_mapped
from flashnorm_compile.passes.sites import Context, Site
from flashnorm_compile.passes.sites.base import square_norm
from flashnorm_compile.passes.sites.fused_matmul import (
    FusedMatmulSite,
    ghosts_together,
    materialized_together,
)
from flashnorm_compile.passes.sites.rounding import bounded_square, materialized_square


@dataclass(frozen=True)
class Norms:
    """What the norm pass leaves in the graph.

    Attributes:
        squares: [B] float32 nodes, whose sum is the squared norm.
        per_sample: (index of the parameter, its gradient's node or a site's) → per-sample gradients
            [B, ...], where its norm is theirs. Another parameter may share the site, and not this.
    """

    squares: list[fx.Node]
    per_sample: dict[tuple[int, fx.Node], fx.Node]


def insert_norms(
    gradients: list[ParameterGradient], plan: Plan, context: Context, scale: fx.Node
) -> Norms:
    """Insert the squared norms, each by the strategy of the plan.

    Args:
        gradients: the gradients and their sites.
        plan: the strategies.
        context: what sites need.
        scale: 0-d; g_i is ``scale`` times what the graph holds (B for a mean loss).
    """
    sites = dict.fromkeys(site for gradient in gradients for site in gradient.sites)
    norms = Norms([site.defects for site in sites if site.defects is not None], {})
    ghosts: list[FusedMatmulSite] = []
    materialized: list[tuple[int, FusedMatmulSite]] = []
    for gradient in gradients:
        choices = plan.choices(gradient.index)
        if len(choices) == len(gradient.sites) and not gradient.affine and _apart(gradient):
            first = gradient.sites[0]
            if choices == ("ghost",) and isinstance(first, FusedMatmulSite):
                ghosts.append(first)
            elif choices == ("materialize",) and isinstance(first, FusedMatmulSite):
                materialized.append((gradient.index, first))
            else:
                _site_by_site(gradient, choices, norms)
        else:
            samples = materialize(gradient, context, scale)
            norms.per_sample[gradient.index, gradient.output] = samples
            _add_square(norms, samples, context)
    norms.squares.extend(ghosts_together(ghosts))
    samples_of, squares = materialized_together([site for _, site in materialized])
    norms.squares.extend(squares)
    for index, site in materialized:
        norms.per_sample[index, site.node] = samples_of[site]
    return norms


def _apart(gradient: ParameterGradient) -> bool:
    """Whether the norm follows from the sites' norms and inner products."""
    return gradient.isometric or len(gradient.sites) > 1


def _site_by_site(gradient: ParameterGradient, choices: tuple[Choice, ...], norms: Norms) -> None:
    """‖Σ_k g_k‖² = Σ_k ‖g_k‖² + 2 Σ_{k<l} ⟨g_k, g_l⟩."""
    sites = gradient.sites
    if choices == ("materialize",):
        key = gradient.index, sites[0].node
        norms.per_sample[key], square = sites[0].measured()
        norms.squares.append(square)
        return
    materialized = {
        site: site.per_sample()
        for site, choice in zip(sites, choices, strict=True)
        if choice == "materialize"
    }
    for site, samples in materialized.items():
        norms.per_sample[gradient.index, site.node] = samples
    squares = [
        _square(site, choice, materialized) for site, choice in zip(sites, choices, strict=True)
    ]
    products = [
        _inner_product(gradient, first, second, materialized)
        for i, second in enumerate(sites)
        for first in sites[:i]
    ]
    tolerance = max(site.rounding.tolerance for site in sites if site not in materialized)

    count = 2 * len(squares)

    def code(*values: torch.Tensor) -> torch.Tensor:
        found, crossed = values[:count], values[count:]
        return bounded_square(found[::2], found[1::2], crossed[::2], crossed[1::2], tolerance)

    emitted = [node for found in (*squares, *products) for node in found]
    emit = sites[0].context.emit
    last = max(emitted)
    norms.squares.append(emit(code, *emitted, before=last.next, like=gradient.output))


def _inner_product(
    gradient: ParameterGradient, first: Site, second: Site, materialized: dict[Site, fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """Emit ⟨first, second⟩ and its largest error, of which at most one is materialised."""
    for ghost, other in ((first, second), (second, first)):
        if other in materialized:
            return ghost.samples_product(materialized[other])
    ordered = pair(first, second)
    assert ordered is not None
    known, other, _ = ordered
    return known.inner_product(
        other, bool(gradient.orientation(known)), bool(gradient.orientation(other))
    )


def _square(
    site: Site, choice: Choice, materialized: dict[Site, fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """Emit a site's square and its slack, for a sum with other sites."""
    if choice == "ghost":
        return site.ghost()
    if choice == "flash":
        return site.flash()
    samples = materialized[site]
    return site.context.emit(  # type: ignore[no-any-return]
        materialized_square, samples, before=samples.next, like=samples
    )


def _add_square(norms: Norms, samples: fx.Node, context: Context) -> None:
    norms.squares.append(context.emit(square_norm, samples, before=samples.next, like=samples))


def materialize(gradient: ParameterGradient, context: Context, scale: fx.Node) -> fx.Node:
    """Emit a parameter's per-sample gradients [B, *shape], divided by ``scale``."""
    samples = [site.per_sample() for site in gradient.sites]
    if not gradient.tail and not gradient.affine:
        return samples[0]
    if not samples:
        return _constant_samples(gradient, context, scale)
    constants = tail_constants(gradient)
    first_output = gradient.output if gradient.tail else gradient.sites[-1].node

    def code(scale: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        per_sample, fixed = values[: len(samples)], values[len(samples) :]

        def tail(*sites: torch.Tensor) -> torch.Tensor:
            return run_tail(gradient, sites, fixed)

        result = torch.func.vmap(tail)(*per_sample)
        if gradient.affine:
            # The constant part is not scaled with the samples' share: add k/scale in place of k.
            constant = tail(*(torch.zeros_like(x[0]) for x in per_sample))
            result = result + constant * (1 / scale - 1)
        return result

    return context.emit(
        code, scale, *samples, *constants, before=first_output.next, like=gradient.output
    )


def _constant_samples(gradient: ParameterGradient, context: Context, scale: fx.Node) -> fx.Node:
    """A gradient that depends on no sample is part of every sample's gradient."""

    def code(scale: torch.Tensor, batch: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        return (constant.float() / scale).expand(batch.shape[0], *constant.shape)

    return context.emit(code, scale, context.batch, gradient.output, before=gradient.output.next)


def tail_constants(gradient: ParameterGradient) -> list[fx.Node]:
    """The values that the tail reads beside the sites."""
    inside = {site.node for site in gradient.sites} | set(gradient.tail)
    return list(
        dict.fromkeys(
            arg for node in gradient.tail for arg in node.all_input_nodes if arg not in inside
        )
    )


def run_tail(
    gradient: ParameterGradient,
    sites: tuple[torch.Tensor, ...],
    constants: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Run the nodes from the sites to the gradient, in the precision of the sites' values."""
    values: dict[fx.Node, torch.Tensor] = dict(
        zip(tail_constants(gradient), constants, strict=True)
    )
    values |= {site.node: x for site, x in zip(gradient.sites, sites, strict=True)}
    for node in gradient.tail:
        if node.target in CASTS:
            # Narrowing belongs after the noise.
            values[node] = values[node.args[0]]  # type: ignore[index]
            continue
        args = fx.map_arg(node.args, values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, values.__getitem__)
        values[node] = run_mapped(node.target, args, kwargs)
    return values[gradient.output]
