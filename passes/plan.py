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
        choices: how the norms of its sites are found, one choice per site; a single
            "materialize" for a parameter whose sites are summed per sample first.
        cost: predicted work of that strategy beyond the non-private step.
    """

    parameter: str
    index: int
    shape: tuple[int, ...]
    sites: tuple[str, ...]
    source: str
    axis: str
    choices: tuple[Choice, ...]
    cost: Cost

    @property
    def strategy(self) -> str:
        """The choices, for people."""
        return "+".join(dict.fromkeys(self.choices))


@dataclass(frozen=True)
class Plan:
    """What was decided for a step; prints as a table."""

    rows: tuple[Row, ...]

    def choices(self, index: int) -> tuple[Choice, ...]:
        """The choices for the parameter at input ``index``."""
        return next(row.choices for row in self.rows if row.index == index)

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
    choices, cost = _choose(gradient, strategy)
    first = gradient.sites[0] if gradient.sites else None
    return Row(
        parameter=gradient.name,
        index=gradient.index,
        shape=tuple(int(size) for size in gradient.output.meta["val"].shape),
        sites=tuple(site.kind for site in gradient.sites),
        source=source_location(first.node if first else gradient.output),
        axis=first.axis_text if first else "",
        choices=choices,
        cost=cost,
    )


def _choose(gradient: ParameterGradient, strategy: str) -> tuple[tuple[Choice, ...], Cost]:
    """Choose for every site, or sum the sites' per-sample gradients first."""
    together = _sum([site.materialize_cost() for site in gradient.sites])
    products = _inner_product_cost(gradient)
    if strategy == "materialize" or products is None:
        return ("materialize",), together
    # Cross terms belong to the products that the sites sum, not to gradients rounded before.
    several = len(gradient.sites) > 1
    best = [_best(site, "ghost" if several else strategy) for site in gradient.sites]
    apart = _sum([products, *(cost for _, cost in best)])
    if strategy == "auto" and len(best) > 1 and _time(together) <= _time(apart):
        return ("materialize",), together
    return tuple(choice for choice, _ in best), apart


def _best(site: Site, strategy: str) -> tuple[Choice, Cost]:
    materialize, ghost = site.materialize_cost(), site.ghost_cost()
    if ghost is not None and (strategy == "ghost" or _time(ghost) < _time(materialize)):
        return "ghost", ghost
    return "materialize", materialize


def _inner_product_cost(gradient: ParameterGradient) -> Cost | None:
    """The cost of all cross terms; None where a norm cannot be put together from the sites'."""
    sites = gradient.sites
    if gradient.isometric:
        return Cost(0.0, 0.0)
    if len(sites) < 2 or any(gradient.orientation(site) is None for site in sites):
        return None
    costs = []
    for i, second in enumerate(sites):
        for first in sites[:i]:
            if (known := pair(first, second)) is None:
                return None
            costs.append(known[2])
    return _sum(costs)


def pair(first: Site, second: Site) -> tuple[Site, Site, Cost] | None:
    """Order two sites so that the first knows its inner product with the second."""
    for known, other in ((first, second), (second, first)):
        if (cost := known.inner_product_cost(other)) is not None:
            return known, other, cost
    return None


def _sum(costs: list[Cost]) -> Cost:
    return Cost(sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs))


def _time(cost: Cost) -> float:
    return cost.flops + FLOPS_PER_BYTE * cost.bytes
