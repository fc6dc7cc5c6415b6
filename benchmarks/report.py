"""Results as JSON and as a Markdown table."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from profiler import describe

BASELINE = "compiled"
HEADER = (
    "method", "ms (min-max)", f"x {BASELINE}", "peak GiB", f"x {BASELINE}", "first step s",
    "gradient error",
)  # fmt: skip


def write(folder: pathlib.Path, results: Sequence[dict[str, Any]], command: str) -> None:
    """Write ``results.json``, ``table.md`` and, where there are profiles, their texts."""
    folder.mkdir(parents=True, exist_ok=True)
    full = {"command": command, "results": list(results)}
    (folder / "results.json").write_text(json.dumps(full, indent=1))
    (folder / "table.md").write_text(markdown(results, command))
    for workload, rows in _by_workload(results).items():
        profiles = {row["job"]["method"]: row["profile"] for row in rows if "profile" in row}
        if profiles:
            (folder / f"profile-{workload}.txt").write_text(describe(profiles))


def markdown(results: Sequence[dict[str, Any]], command: str) -> str:
    """Return one table for every workload, with the footnotes that its rows need."""
    parts = []
    for workload, rows in _by_workload(results).items():
        parts += [f"### {workload}", "", *_about(rows), "", *_table(rows), ""]
    parts += [
        "Time is the median of forward and backward, `zero_grad` outside; private methods clip "
        "and add noise (σ = 1) inside it. The peak holds everything alive during the step. The "
        "gradient error is relative to a loop over the samples in eager mode, at σ = 0 and with "
        "about half of the samples clipped; for methods without privacy it is that of the mean "
        "gradient, which shows what rounding alone costs. No time is given where a check fails.",
        "",
        f"`{command}`",
        "",
    ]
    return "\n".join(parts)


def one_line(row: dict[str, Any], rows: Iterable[dict[str, Any]] = ()) -> str:
    """Return a result as one line for the terminal."""
    return f"{row['job']['workload']:18} " + "  ".join(
        cell.ljust(width)
        for cell, width in zip(_cells(row, rows), (22, 24, 7, 8, 7, 8, 9), strict=True)
    )


def _by_workload(results: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        found.setdefault(row["job"]["workload"], []).append(row)
    return found


def _about(rows: Sequence[dict[str, Any]]) -> list[str]:
    description = next((row["description"] for row in rows if "description" in row), "")
    job = rows[0]["job"]
    machine = next((row["machine"] for row in rows if "machine" in row), {})
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "triton", "cuda") if name in machine
    )
    precision = "bf16 autocast, fp32 weights" if job["autocast"] else "fp32"
    lowering = (
        "" if job["lowering"] == "inductor" else f"; graphs run as they are ({job['lowering']})"
    )
    return [
        f"{description}; {precision}{lowering}; {machine.get('device', 'unknown')}, {versions}."
    ]


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    notes: list[str] = []
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    for row in rows:
        cells = _cells(row, rows)
        if row.get("note") and row["status"] == "ok":
            if row["note"] not in notes:
                notes.append(row["note"])
            cells[0] += f" [{notes.index(row['note']) + 1}]"
        lines.append("| " + " | ".join(cells) + " |")
    return lines + [""] * bool(notes) + [f"[{i}] {note}" for i, note in enumerate(notes, 1)]


def _cells(row: dict[str, Any], rows: Iterable[dict[str, Any]]) -> list[str]:
    method = row["job"]["method"]
    check = row.get("check", {})
    error = f"{check['gradient_error']:.1e}" if check else ""
    first_step = f"{row['first_step_s']:.1f}" if "first_step_s" in row else ""
    if row["status"] != "ok":
        reason = " ".join(row.get("reason", "").replace("|", "/").split())[:160]
        return [method, f"{row['status']}: {reason}", "", "", "", first_step, error]
    timing = row["timing"]
    baseline = next(
        (r["timing"] for r in rows if r["job"]["method"] == BASELINE and r["status"] == "ok"), None
    )
    peak = timing["peak_bytes"]
    time_ratio = f"{timing['median_ms'] / baseline['median_ms']:.2f}" if baseline else ""
    memory_ratio = f"{peak / baseline['peak_bytes']:.2f}" if baseline and peak else ""
    return [
        method,
        f"{timing['median_ms']:.2f} ({timing['min_ms']:.2f}-{timing['max_ms']:.2f})",
        time_ratio,
        f"{peak / 2**30:.2f}" if peak else "",
        memory_ratio,
        first_step,
        error,
    ]
