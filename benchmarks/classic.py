"""The comparison that papers show: memory and speed against standard DP-SGD."""

from __future__ import annotations

from collections.abc import Sequence

from groups import Group, ratio
from methods import method_names
from models import find_workload
from sweeps import CLASSIC_ROWS, classic_workload


def classic_table(found: Sequence[Group]) -> list[str]:
    """Return the table's lines; none if it was not measured.

    Rows that have no method yet, or none that ran, are left out and named below the table.
    """
    names = [classic_workload(smoke=smoke) for smoke in (False, True)]
    group = next((group for group in found if group.workload in names), None)
    if group is None:
        return []
    chosen = {
        label: next((m for m in methods if group.milliseconds(m) is not None), None)
        for label, methods in CLASSIC_ROWS.items()
    }
    standard = next(iter(chosen.values()))
    lines = [
        "### Against standard DP-SGD",
        "",
        f"{find_workload(group.workload).description}. Standard DP-SGD keeps every sample's "
        "gradient until all are clipped.",
        "",
        "| | method | ms | speed-up | peak GiB | memory reduction |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for label, method in chosen.items():
        if method is None:
            continue
        time, peak = group.milliseconds(method), group.gibibytes(method)
        speed = ratio(group.milliseconds(standard), time) if standard else None
        memory = ratio(group.gibibytes(standard), peak) if standard else None
        cells = [
            label, method, f"{time:.1f}", f"{speed:.1f}×" if speed else "",
            f"{peak:.2f}" if peak else "", f"{memory:.1f}×" if memory else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    for label, method in chosen.items():
        if method is None:
            there = any(name in method_names() for name in CLASSIC_ROWS[label])
            lines += ["", f"{label}: {'not measured' if there else 'no such strategy yet'}."]
    return [*lines, ""]
