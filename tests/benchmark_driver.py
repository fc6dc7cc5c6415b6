"""A job of the benchmark that takes no time, and results of jobs."""

from __future__ import annotations

import dataclasses

import jobs

JOB = jobs.Job(
    "tiny-gpt2-t6-b3", "eager", "cpu", autocast=False, lowering="eager", warmup=0, iterations=1
)
PLACE = {"commit": "0123abc", "machine": {"device": "a GPU", "torch": "2", "cuda": "13"}}


def row(method: str, ms: float = 1.0, gib: float = 1.0, **more) -> dict:
    timing = {"median_ms": ms, "min_ms": ms, "max_ms": ms, "iterations": 1}
    timing["peak_bytes"] = int(gib * 2**30)
    job = {name: more.pop(name) for name in dataclasses.asdict(JOB) if name in more}
    return {
        "job": dataclasses.asdict(JOB) | {"method": method} | job,
        "status": "ok",
        "timing": timing,
        "first_step_s": 2.0 * ms,
        "check": {"gradient_error": 0.001},
        "description": "a model",
        **PLACE,
        **more,
    }
