"""Which strategy finds each parameter's per-sample norms, from a cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flashnorm_compile._torch import source_location
from flashnorm_compile.passes.gradient_sites import ParameterGradient
from flashnorm_compile.passes.sites import Cost, Site

Choice = Literal["materialize", "ghost"]

# A matrix product moves about this many FLOPs per byte of memory traffic on current hardware;
# it puts the two costs of a strategy on one scale.
FLOPS_PER_BYTE = 150.0


@dataclass(frozen=True)
class Row:
    """What was decided for one parameter.

    Attributes:
        parameter: the user's name.
        index: its position among the graph's inputs.
        shape: its shape.
        sites: kinds of its gradient sites.
        source: the user's line that makes the gradient.
        axis: the batch axis of the operands ("dim 0 of [8, 16]").
        strategy: how its per-sample norms are found.
        cost: predicted work of that strategy beyond the non-private step.
    """

    parameter: str
    index: int
    shape: tuple[int, ...]
    sites: tuple[str, ...]
    source: str
    axis: str
    strategy: Choice
    cost: Cost


@dataclass(frozen=True)
class Plan:
    """What was decided for a step; prints as a table."""

    rows: tuple[Row, ...]

    def strategy(self, index: int) -> Choice:
        """The strategy of the parameter at input ``index``."""
        return next(row.strategy for row in self.rows if row.index == index)

    def __str__(self) -> str:
        header = ("parameter", "shape", "sites", "axis", "strategy", "MFLOP", "MB", "source")
        lines = [header] + [
            (
                row.parameter,
                "×".join(map(str, row.shape)) or "scalar",
                "+".join(row.sites) or "constant",
                row.axis,
                row.strategy,
                f"{row.cost.flops / 1e6:.2f}",
                f"{row.cost.bytes / 1e6:.2f}",
                row.source,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def make_plan(gradients: list[ParameterGradient], strategy: str) -> Plan:
    """Choose a strategy for every parameter.

    Args:
        gradients: the gradients and their sites.
        strategy: "auto", or the strategy to use wherever a parameter allows it.
    """
    return Plan(tuple(_row(gradient, strategy) for gradient in gradients))


def _row(gradient: ParameterGradient, strategy: str) -> Row:
    ghost = ghost_cost(gradient)
    materialize = _sum([site.materialize_cost() for site in gradient.sites])
    choice: Choice = "materialize"
    if ghost is not None and strategy != "materialize":
        choice = "ghost" if strategy == "ghost" or _time(ghost) < _time(materialize) else choice
    first = gradient.sites[0] if gradient.sites else None
    return Row(
        parameter=gradient.name,
        index=gradient.index,
        shape=tuple(int(size) for size in gradient.output.meta["val"].shape),
        sites=tuple(site.kind for site in gradient.sites),
        source=source_location(first.node if first else gradient.output),
        axis=first.axis_text if first else "",
        strategy=choice,
        cost=ghost if choice == "ghost" and ghost is not None else materialize,
    )


def ghost_cost(gradient: ParameterGradient) -> Cost | None:
    """Return the cost of the norms without the gradients; None if that is not possible."""
    costs = [site.ghost_cost() for site in gradient.sites]
    if not costs or any(cost is None for cost in costs):
        return None
    known = [cost for cost in costs if cost is not None]
    if len(known) == 1:
        return known[0] if gradient.isometric else None
    sites = gradient.sites
    oriented = all(gradient.orientation(site) is not None for site in sites)
    if not oriented or any(
        pair(first, second) is None for i, second in enumerate(sites) for first in sites[:i]
    ):
        return None
    # k sites make k(k+1)/2 products of about the mean size.
    total = _sum(known)
    factor = (len(sites) + 1) / 2
    return Cost(total.flops * factor, total.bytes * factor)


def pair(first: Site, second: Site) -> tuple[Site, Site] | None:
    """Order two sites so that the first knows its inner product with the second."""
    for known, other in ((first, second), (second, first)):
        if known.has_inner_product(other):
            return known, other
    return None


def _sum(costs: list[Cost]) -> Cost:
    return Cost(sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs))


def _time(cost: Cost) -> float:
    return cost.flops + FLOPS_PER_BYTE * cost.bytes

