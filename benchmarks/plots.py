"""Pictures of the results: ratios over the workloads, and costs that grow with a size."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from groups import BASELINE, Group, ratio
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
)
from models import WORKLOADS
from sweeps import SWEEP_METHODS, SWEEPS, Sweep

Quantity = Callable[[Group, str], float | None]


@dataclass(frozen=True)
class Style:
    """How a method is drawn, in every picture: colours of Okabe and Ito, told apart by anyone."""

    label: str
    color: str
    marker: str


STYLES = {
    "compiled": Style("torch.compile, not private", "#000000", "o"),
    "compiled-reduce-overhead": Style("torch.compile, CUDA graphs", "#444444", "o"),
    "flashnorm-auto": Style("flashnorm", "#0072B2", "s"),
    "flashnorm-auto-library": Style("flashnorm, library operations", "#CC79A7", "D"),
    "flashnorm-reduce-overhead": Style("flashnorm, CUDA graphs", "#004a75", "s"),
    "flashnorm-materialize": Style("flashnorm, materialize", "#56B4E9", "^"),
    "flashnorm-ghost": Style("flashnorm, ghost", "#009E73", "v"),
    "flashnorm-flash": Style("flashnorm, flash", "#8A3D6B", "d"),
    "eager": Style("PyTorch eager, not private", "#8a8a8a", "o"),
    "opacus-ghost": Style("Opacus, ghost", "#D55E00", "P"),
    "opacus-hooks": Style("Opacus, hooks", "#E69F00", "X"),
    "vmap": Style("vmap + torch.compile", "#7A5C00", "*"),
    "vmap-eager": Style("vmap, eager", "#B09A4E", "*"),
}
GRID, TEXT = "#dddddd", "#333333"
#: Longer bars are cut off, and say how long they are.
LONGEST = 6.0
NO_MEMORY = "(out of memory)"


def draw(folder: pathlib.Path, found: Sequence[Group]) -> None:
    """Write a PNG for everything that there are results for."""
    by_name = {group.workload: group for group in found}
    compared = [group for name in WORKLOADS if (group := by_name.get(name)) is not None]
    if any(_private(group) for group in compared):
        draw_ratios(folder / "ratios.png", [group for group in compared if _private(group)])
    for key, sweep in SWEEPS.items():
        for points in (sweep.workloads, sweep.smoke):
            there = {x: by_name[name] for x, name in points.items() if name in by_name}
            if len(there) > 1:
                draw_sweep(folder / f"sweep-{key}.png", sweep, there)


def _private(group: Group) -> list[str]:
    """Methods with a ratio to show."""
    if group.milliseconds(BASELINE) is None:
        return []
    return [name for name in group.steps if name != BASELINE]


# --- bars -----------------------------------------------------------------------------------------


def draw_ratios(path: pathlib.Path, found: Sequence[Group]) -> None:
    """Draw time and memory as multiples of the baseline's, one bar a method and workload."""
    # What was measured here and there only would leave gaps.
    often = [name for group in found for name in _private(group)]
    methods = [name for name in STYLES if 2 * often.count(name) >= len(found)]
    height = 1.2 + len(found) * (0.17 * len(methods) + 0.12)
    figure = Figure(figsize=(11, height), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    kinds: tuple[tuple[str, Quantity], ...] = (
        ("time of a step", Group.milliseconds),
        ("peak memory", Group.gibibytes),
    )
    for axes, (title, quantity) in zip(panels, kinds, strict=True):
        _bars(axes, found, methods, quantity)
        axes.set_title(f"{title}, × torch.compile without privacy", fontsize=11, loc="left")
    panels[0].set_yticks(range(len(found)), [group.workload for group in found])
    panels[0].set_ylim(len(found) - 0.45, -0.55)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=min(5, len(labels)), frameon=False
    )
    figure.supxlabel(_where(found[0]), fontsize=8, color=TEXT, x=0.99, ha="right")
    figure.savefig(path)


def _bars(axes: Axes, found: Sequence[Group], methods: Sequence[str], quantity: Quantity) -> None:
    thickness = 0.84 / len(methods)
    shown = 1.0
    axes.axvline(1.0, color="#000000", linewidth=1.0, zorder=2)
    for i, method in enumerate(methods):
        style = STYLES[method]
        places = [y + (i - (len(methods) - 1) / 2) * thickness for y in range(len(found))]
        values = [
            ratio(quantity(group, method), quantity(group, BASELINE)) or 0.0 for group in found
        ]
        lengths = [min(value, LONGEST) for value in values]
        shown = max(shown, *lengths)
        axes.barh(places, lengths, 0.88 * thickness, color=style.color, label=style.label)
        for y, value, length, group in zip(places, values, lengths, found, strict=True):
            text = f"{value:.2f}" + "  ▸" * (value > LONGEST)
            axes.annotate(
                text if value else _missing(group, method), (length, y), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=7.5, color=TEXT, zorder=3,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
    axes.set_xlim(0, 1.13 * shown)
    axes.xaxis.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _missing(group: Group, method: str) -> str:
    status = group.steps.get(method, {}).get("status")
    return "" if status in (None, "ok") else f"({status})"


# --- lines ----------------------------------------------------------------------------------------


def draw_sweep(path: pathlib.Path, sweep: Sweep, points: dict[int, Group]) -> None:
    """Draw time and memory against a size, one line a method."""
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    kinds: tuple[tuple[str, Quantity], ...] = (
        ("ms a step", Group.milliseconds),
        ("peak GiB", Group.gibibytes),
    )
    for axes, (label, quantity) in zip(panels, kinds, strict=True):
        _lines(axes, points, quantity)
        axes.set_xlabel(sweep.label)
        axes.set_ylabel(label)
    figure.suptitle(sweep.title, x=0.01, ha="left", fontsize=12)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    where = _where(next(iter(points.values())))
    figure.supxlabel(where, fontsize=8, color=TEXT, x=0.99, ha="right")
    figure.savefig(path)


def _lines(axes: Axes, points: dict[int, Group], quantity: Quantity) -> None:
    for position, (method, style) in enumerate(STYLES.items()):
        known = [(x, value) for x, group in points.items() if (value := quantity(group, method))]
        if method not in SWEEP_METHODS or not known:
            continue
        full = [f"{x}" for x, group in points.items() if _missing(group, method) == NO_MEMORY]
        label = style.label + (f"\n(out of memory at {', '.join(full)})" if full else "")
        axes.plot(
            *zip(*known, strict=True), color=style.color, marker=style.marker, markersize=5.5,
            linewidth=1.8, label=label, zorder=3 - position / len(STYLES),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(points)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _where(group: Group) -> str:
    row: dict[str, Any] = group.any_row()
    machine, job = row["machine"], row["job"]
    precision = "bf16 autocast" if job["autocast"] else "fp32"
    return f"{machine.get('device')}, torch {machine.get('torch')}, {precision}"
