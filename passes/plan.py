"""Which strategy finds each parameter's per-sample norms, from a cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flashnorm_compile._torch import source_location
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.passes.cost import Cost
from flashnorm_compile.passes.gradient_sites import ParameterGradient
from flashnorm_compile.passes.sites import Site

Choice = Literal["materialize", "ghost", "flash"]
_Option = tuple[tuple[Choice, ...], Cost]


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
        fused: whether kernels of this package make its norms and sums.
        choices: how the norms of its sites are found, one choice per site; a single
            "materialize" for a parameter whose sites are summed per sample first.
        cost: predicted work of that strategy beyond the non-private step, for the batch that was
            traced.
    """

    parameter: str
    index: int
    shape: tuple[int, ...]
    sites: tuple[str, ...]
    source: str
    axis: str
    fused: bool
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
        header = (
            "parameter", "shape", "sites", "axis", "strategy", "kernels", "µs", "MFLOP", "MB",
            "kept MB", "source",
        )  # fmt: skip
        lines = [header] + [
            (
                row.parameter,
                "×".join(map(str, row.shape)) or "scalar",
                "+".join(row.sites) or "constant",
                row.axis,
                row.strategy,
                "fused" if row.fused else "library",
                f"{row.cost.seconds * 1e6:.1f}",
                f"{row.cost.flops / 1e6:.2f}",
                f"{row.cost.bytes / 1e6:.2f}",
                f"{row.cost.kept / 1e6:.2f}",
                row.source,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def make_plan(
    gradients: list[ParameterGradient], strategy: str, memory_budget: float | None = None
) -> Plan:
    """Choose a strategy for every parameter.

    Args:
        gradients: the gradients and their sites.
        strategy: "auto", or the strategy to use wherever a parameter allows it.
        memory_budget: bytes that may be kept until clipping, by the cost model; None is no limit.

    Raises:
        PrivacyError: no choice keeps so little.
    """
    options = [_options(gradient, strategy) for gradient in gradients]
    chosen = [min(each, key=lambda option: option[1].price) for each in options]
    if memory_budget is not None:
        _economize(chosen, options, memory_budget)
    return Plan(
        tuple(
            _row(gradient, choices, cost)
            for gradient, (choices, cost) in zip(gradients, chosen, strict=True)
        )
    )


def _row(gradient: ParameterGradient, choices: tuple[Choice, ...], cost: Cost) -> Row:
    first = gradient.sites[0] if gradient.sites else None
    return Row(
        parameter=gradient.name,
        index=gradient.index,
        shape=tuple(int(size) for size in gradient.output.meta["val"].shape),
        sites=tuple(site.kind for site in gradient.sites),
        source=source_location(first.node if first else gradient.output),
        axis=first.axis_text if first else "",
        fused=any(site.fused for site in gradient.sites),
        choices=choices,
        cost=cost,
    )


def _economize(chosen: list[_Option], options: list[list[_Option]], budget: float) -> None:
    """Exchange choices in place, the cheapest byte first, until they keep no more than that."""
    while (excess := sum(cost.kept for _, cost in chosen) - budget) > 0:
        exchanges = [
            ((cost.price - now.price) / min(now.kept - cost.kept, excess), i, (choices, cost))
            for i, (_, now) in enumerate(chosen)
            for choices, cost in options[i]
            if cost.kept < now.kept
        ]
        if not exchanges:
            least = sum(cost.kept for _, cost in chosen)
            raise PrivacyError(
                f"flashnorm option memory_budget={budget:g} is less than any strategy keeps until "
                f"the clipping factors are known, {least:g} bytes for the batch that was traced. "
                "Raise it, or use smaller batches (see accumulate)."
            )
        _, i, better = min(exchanges, key=lambda exchange: exchange[:2])
        chosen[i] = better


def _options(gradient: ParameterGradient, strategy: str) -> list[_Option]:
    """Return what may be chosen: for every site, or to sum the sites' gradients first."""
    sites = gradient.sites
    options: list[_Option] = [
        (("materialize",), _sum([site.materialize_cost() for site in sites]))
    ]
    if strategy == "materialize":
        return options
    if gradient.isometric:
        options += _alone(sites[0])
    elif len(sites) > 1:
        options += _apart(gradient)
    if strategy == "auto":
        return options
    # All by ghost norms comes last of what has any.
    asked = [option for option in options if strategy in option[0]]
    return asked[-1:] or options


def _alone(site: Site) -> list[_Option]:
    options: list[_Option] = []
    if (cost := site.ghost_cost()) is not None:
        options.append((("ghost",), cost))
    if (cost := site.flash_cost()) is not None:
        options.append((("flash",), cost))
    return options


def _apart(gradient: ParameterGradient) -> list[_Option]:
    """Norms from those of the sites and their inner products: one is materialised, or none."""
    sites = gradient.sites
    if any(gradient.orientation(site) is None for site in sites):
        return []
    options: list[_Option] = []
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
    return sum(costs, Cost())
