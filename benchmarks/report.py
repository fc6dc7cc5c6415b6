"""Results as JSON, as Markdown and as plots."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from classic import classic_table
from groups import BASELINE, Group, groups, of_last_machine, ratio
from models import WORKLOADS
from profiler import describe, kernels_per_step

STEP_PARTS = "zero_grad, forward, backward, {private}and the update by fused AdamW"
NOTES = (
    "Time is the median of a step ({parts}), one after the other. The peak holds everything alive "
    "during the step; with reduce-overhead (CUDA graphs), what the allocator reserved. The first "
    "step compiles, with empty caches. Gradient errors are relative to a loop over the samples in "
    "eager mode, at σ = 0 and with about half of the samples clipped; those of methods without "
    "privacy are of the mean gradient, and show what rounding alone costs. No time is given where "
    "a check fails. The largest batch is searched with real steps; it is exact, or 3 % below."
)


def save(folder: pathlib.Path, results: Sequence[dict[str, Any]], command: str) -> None:
    """Write ``results.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    # Never half a file, whenever the process is ended.
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps({"command": command, "results": list(results)}, indent=1))
    unfinished.replace(path)


def write(folder: pathlib.Path, results: list[dict[str, Any]], command: str) -> None:
    """Write all files of the report."""
    save(folder, results, command)
    (folder / "table.md").write_text(markdown(results, command))
    found = of_last_machine(results)
    texts = []
    for group in found:
        profiles = {name: row["profile"] for name, row in group.steps.items() if "profile" in row}
        if profiles:
            texts.append(f"{group.workload}\n\n{describe(profiles)}")
    if texts:
        (folder / "profile.txt").write_text("\n\n".join(texts))
    try:
        import plots
    except ImportError as error:
        print(f"No plots: {error}")
        return
    plots.draw(folder, found)


def markdown(results: list[dict[str, Any]], command: str) -> str:
    """Return the summary, the classic comparison and a table for every workload."""
    found = groups(results)
    parts = [*_summary(of_last_machine(results)), *classic_table(of_last_machine(results))]
    for group in found:
        parts += [f"### {group.workload}", "", _about(group), "", *_table(group), ""]
    update = not found or found[0].any_row()["job"]["optimizer"]
    private = "with clipping and noise (σ = 1) where private, "
    steps = STEP_PARTS.format(private=private) if update else f"forward and backward, {private}"
    parts += [NOTES.format(parts=steps.rstrip(", ")), "", f"`{command}`", ""]
    return "\n".join(parts)


def one_line(row: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Return a result as one line for the terminal."""
    name = row["job"]["method"]
    group = next(
        group
        for group in groups([*results, row])
        if row is group.steps.get(name) or row is group.largest.get(name)
    )
    method, text = row["job"]["method"], row.get("reason", "")
    if row["status"] == "ok" and "largest" in row:
        largest = row["largest"]
        text = f"largest batch {largest['batch_size']} ({largest['ended']})"
    elif row["status"] == "ok":
        time, peak = group.milliseconds(method), group.gibibytes(method)
        text = f"{time:10.2f} ms {_times(_ratio(group, method, Group.milliseconds)):>6}"
        if peak is not None:
            text += f"{peak:8.2f} GiB {_times(_ratio(group, method, Group.gibibytes)):>6}"
        if (first := group.first_step(method)) is not None:
            text += f"   first step {first:.1f} s"
        text += f"   gradient error {row['check']['gradient_error']:.1e}"
    status = "" if row["status"] == "ok" else f"{row['status']}: "
    return f"{group.workload:18} {method:26} {status}{' '.join(text.split(chr(10)))[:200]}"


def _ratio(group: Group, method: str, quantity: Any) -> float | None:
    return ratio(quantity(group, method), quantity(group, BASELINE))


def _times(value: float | None) -> str:
    return "" if value is None else f"×{value:.2f}"


def _summary(found: Sequence[Group]) -> list[str]:
    """One line a workload, one column a method: times the baseline's time and memory."""
    chosen = [g for g in found if g.workload in WORKLOADS and g.milliseconds(BASELINE)]
    often = [m for group in chosen for m in group.methods() if m != BASELINE]
    methods = [m for m in dict.fromkeys(often) if 2 * often.count(m) >= len(chosen)]
    if not (chosen and methods):
        return []
    header = ["workload", f"{BASELINE}, ms", "GiB", *methods]
    lines = [f"Time and memory, × {BASELINE}:", "", _line(header), _line(["---"] * len(header))]
    for group in chosen:
        cells = [group.workload, f"{group.milliseconds(BASELINE):.1f}"]
        cells.append(_number(group.gibibytes(BASELINE), ".2f"))
        for method in methods:
            time = _number(_ratio(group, method, Group.milliseconds), ".2f")
            peak = _number(_ratio(group, method, Group.gibibytes), ".2f")
            status = group.steps.get(method, {}).get("status", "")
            cells.append(f"{time}, {peak}".strip(", ") or status)
        lines.append(_line(cells))
    return [*lines, ""]


def _about(group: Group) -> str:
    rows = [*group.steps.values(), *group.largest.values()]
    description = next((row["description"] for row in rows if "description" in row), "")
    job, machine = rows[0]["job"], rows[0]["machine"]
    versions = ", ".join(f"{name} {text}" for name, text in machine.items() if name != "device")
    precision = "bf16 autocast, fp32 weights" if job["autocast"] else "fp32"
    lowering = (
        "" if job["lowering"] == "inductor" else f"; graphs run as they are ({job['lowering']})"
    )
    return f"{description}; {precision}{lowering}; {machine.get('device')}, {versions}."


def _table(group: Group) -> list[str]:
    header = [
        "method", "ms (min-max)", f"× {BASELINE}", "peak GiB", f"× {BASELINE}", "first step s",
        f"× {BASELINE}", "gradient error",
    ]  # fmt: skip
    profiled = any("profile" in row for row in group.steps.values())
    limits = [row["job"]["memory_limit_gib"] for row in group.largest.values()]
    if profiled:
        header.append("kernels")
    if group.largest:
        header += [f"largest B in {limits[0]:g} GiB", f"× {BASELINE}"]
    header.append("commit")
    lines, notes = [_line(header), _line(["---"] * len(header))], list[str]()
    for method in group.methods():
        row = group.steps.get(method, {})
        cells = _cells(group, method, row)
        if row.get("note") and row["status"] == "ok":
            if row["note"] not in notes:
                notes.append(row["note"])
            cells[0] += f" [{notes.index(row['note']) + 1}]"
        if profiled:
            known = "profile" in row
            cells.append(f"{kernels_per_step(row['profile']):.0f}" if known else "")
        if group.largest:
            cells += _largest_cells(group, method)
        cells.append((row or group.largest[method]).get("commit", ""))
        lines.append(_line(cells))
    return lines + [""] * bool(notes) + [f"[{i}] {note}" for i, note in enumerate(notes, 1)]


def _cells(group: Group, method: str, row: dict[str, Any]) -> list[str]:
    error = _number(row.get("check", {}).get("gradient_error"), ".1e")
    first = [
        _number(group.first_step(method), ".1f"),
        _number(_ratio(group, method, Group.first_step), ".2f"),
    ]
    if "timing" not in row:
        reason = " ".join(row.get("reason", "").replace("|", "/").split())[:160]
        return [method, f"{row['status']}: {reason}" if row else "", "", "", "", *first, error]
    timing = row["timing"]
    return [
        method,
        f"{timing['median_ms']:.2f} ({timing['min_ms']:.2f}-{timing['max_ms']:.2f})",
        _number(_ratio(group, method, Group.milliseconds), ".2f"),
        _number(group.gibibytes(method), ".2f"),
        _number(_ratio(group, method, Group.gibibytes), ".2f"),
        *first,
        error,
    ]


def _largest_cells(group: Group, method: str) -> list[str]:
    row = group.largest.get(method, {})
    if "largest" not in row:
        return [row.get("status", ""), ""]
    found = row["largest"]
    at_least = "" if found["ended"] == "memory" else "≥ "
    return [
        f"{at_least}{found['batch_size']}",
        _number(_ratio(group, method, Group.largest_batch), ".2f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
