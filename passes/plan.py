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
    sites = gradient.sites
    options: list[tuple[tuple[Choice, ...], Cost]] = [
        (("materialize",), _sum([site.materialize_cost() for site in sites]))
    ]
    if strategy == "materialize":
        return options[0]
    if gradient.isometric:
        options += _alone(sites[0])
    elif len(sites) > 1:
        options += _apart(gradient)
    # All by ghost norms comes last.
    return options[-1] if strategy == "ghost" else min(options, key=lambda x: _time(x[1]))


def _alone(site: Site) -> list[tuple[tuple[Choice, ...], Cost]]:
    cost = site.ghost_cost()
    return [] if cost is None else [(("ghost",), cost)]


def _apart(gradient: ParameterGradient) -> list[tuple[tuple[Choice, ...], Cost]]:
    """Norms from those of the sites and their inner products: one is materialised, or none."""
    sites = gradient.sites
    if any(gradient.orientation(site) is None for site in sites):
        return []
    options = []
    for materialized in (*sites, None):
        choices: tuple[Choice, ...] = tuple(
            "materialize" if site is materialized else "ghost" for site in sites
        )
        costs = [
            site.materialize_cost() if site is materialized else site.ghost_cost()
            for site in sites
        ]
        for i, second in enumerate(sites):
            costs += [_product_cost(gradient, x, second, materialized) for x in sites[:i]]
        if all(cost is not None for cost in costs):
            options.append((choices, _sum([cost for cost in costs if cost is not None])))
    return options


def _product_cost(
    gradient: ParameterGradient, first: Site, second: Site, materialized: Site | None
) -> Cost | None:
    """The cost of the inner product of two sites; None where it is not known."""
    if materialized in (first, second):
        ghost = first if second is materialized else second
        alike = gradient.orientation(first) == gradient.orientation(second)
        return ghost.samples_product_cost() if alike else None
    known = pair(first, second)
    return None if known is None else known[2]


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
