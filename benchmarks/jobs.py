"""What is to be measured, in which order, and what is known already."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from methods import rank

STEP, LARGEST_BATCH = "step", "largest batch"
#: Results that another run would not change. A timeout is one if it had the whole time limit.
FINAL = ("ok", "wrong", "failed", "out of memory")
#: What is measured first, and next; the rest comes last.
URGENT = (
    ("compiled", "flashnorm-auto", "flashnorm-auto-library"),
    ("eager", "opacus-ghost", "opacus-hooks"),
)
_EFFORT = ("warmup", "iterations", "profile")


@dataclass(frozen=True)
class Job:
    """One method on one workload; see ``step.py`` for the meaning of the options.

    ``kind`` is STEP or LARGEST_BATCH.
    """

    workload: str
    method: str
    device: str
    kind: str = STEP
    autocast: bool = True
    lowering: str = "inductor"
    optimizer: bool = True
    warmup: int = 5
    iterations: int = 20
    profile: bool = False
    memory_limit_gib: float | None = None


def make_jobs(
    pairs: Sequence[tuple[str, str]],
    options: argparse.Namespace,
    largest_for: Iterable[str] = (),
) -> list[Job]:
    """Return the jobs for pairs of a workload and a method, what matters first first.

    That is the baseline and flashnorm on all workloads, then their largest batches; then the
    other methods that are compared by default; then the rest. The order within is that of the
    pairs.
    """
    found = []
    for workload, method in dict.fromkeys(pairs):
        job = Job(
            workload=workload,
            method=method,
            device=options.device,
            autocast=options.precision == "bf16",
            lowering=options.lowering,
            optimizer=options.optimizer,
            warmup=options.warmup,
            iterations=options.iterations,
            profile=options.profile and method in URGENT[0],
        )
        found.append(job)
        if options.largest_batch and workload in largest_for:
            limit = options.memory_limit
            found.append(
                dataclasses.replace(
                    job, kind=LARGEST_BATCH, profile=False, memory_limit_gib=limit
                )
            )
    return sorted(found, key=lambda job: (_urgency(job.method), job.kind != STEP))


def _urgency(method: str) -> int:
    return next((i for i, methods in enumerate(URGENT) if method in methods), len(URGENT))


def is_known(
    job: Job, results: Iterable[dict[str, Any]], place: dict[str, Any], time_limit: float
) -> bool:
    """Return whether a job was done at this commit, on a machine like this one.

    Args:
        job: what is to be measured.
        results: those so far.
        place: "machine" and "commit" of now.
        time_limit: seconds a job may take.
    """
    return any(
        result["job"] == dataclasses.asdict(job)
        and _same_machine(result, place)
        and result["commit"] == place["commit"]
        and (result["status"] in FINAL or result.get("limit_s", 0.0) >= time_limit)
        for result in results
    )


def merged(results: Iterable[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results with a new one, in place of an older one of the same.

    What was measured is not given up for a job that there was no time for.
    """
    old = [result for result in results if _about(result) == _about(new)]
    old = [result for result in old if _same_machine(result, new)]
    if new["status"] == "skipped" and any(result["status"] == "ok" for result in old):
        return list(results)
    return [*(result for result in results if result not in old), new]


def _about(result: dict[str, Any]) -> dict[str, Any]:
    """What a result is about, however it was measured."""
    return {name: value for name, value in result["job"].items() if name not in _EFFORT}


def _same_machine(result: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(result["machine"].get(x) == other["machine"].get(x) for x in ("device", "torch"))


def by_rank(methods: Iterable[str]) -> list[str]:
    """Return methods in the order of tables."""
    return sorted(methods, key=rank)
