"""Results that may be compared with each other: one workload, one machine, one way to measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jobs import LARGEST_BATCH, by_rank

BASELINE = "compiled"


@dataclass
class Group:
    """The results of a workload.

    Attributes:
        workload: its name.
        steps: measured steps by method, in the order of tables.
        largest: searches for the largest batch, by method.
    """

    workload: str
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    largest: dict[str, dict[str, Any]] = field(default_factory=dict)

    def any_row(self) -> dict[str, Any]:
        return next(iter((*self.steps.values(), *self.largest.values())))

    def methods(self) -> list[str]:
        return by_rank(dict.fromkeys((*self.steps, *self.largest)))

    def milliseconds(self, method: str) -> float | None:
        """Return the median time; None where there is none."""
        return self._timing(method).get("median_ms")

    def gibibytes(self, method: str) -> float | None:
        peak = self._timing(method).get("peak_bytes")
        return None if peak is None else peak / 2**30

    def first_step(self, method: str) -> float | None:
        return self.steps.get(method, {}).get("first_step_s")

    def largest_batch(self, method: str) -> float | None:
        return self.largest.get(method, {}).get("largest", {}).get("batch_size")

    def _timing(self, method: str) -> dict[str, Any]:
        return self.steps.get(method, {}).get("timing", {})


def ratio(value: float | None, base: float | None) -> float | None:
    """Return how many times the base a value is; None where one is not known."""
    return value / base if value is not None and base else None


def groups(results: Iterable[dict[str, Any]]) -> list[Group]:
    """Sort results into groups, in the order in which workloads were measured."""
    found: dict[tuple[Any, ...], Group] = {}
    for result in results:
        job, machine = result["job"], result["machine"]
        setting = [job[name] for name in ("workload", "autocast", "lowering", "optimizer")]
        key = (*setting, machine.get("device"), machine.get("torch"))
        group = found.setdefault(key, Group(job["workload"]))
        kind = group.largest if job["kind"] == LARGEST_BATCH else group.steps
        kind[job["method"]] = result
    return list(found.values())


def of_last_machine(results: list[dict[str, Any]]) -> list[Group]:
    """Return the groups that can stand in one picture: measured as the last result was."""
    if not results:
        return []

    def way(result: dict[str, Any]) -> tuple[Any, ...]:
        job, machine = result["job"], result["machine"]
        return (
            job["autocast"], job["lowering"], job["optimizer"],
            machine.get("device"), machine.get("torch"),
        )  # fmt: skip

    return groups(result for result in results if way(result) == way(results[-1]))
