"""Measures one method on one workload; a process of its own, so that memory starts clean.

``python worker.py JOB RESULT``: JOB is a ``Job`` in JSON, RESULT the path of the JSON to write.
The process imports what it needs, then waits for its standard input, which holds the seconds it
has, and is closed when its turn has come. ``python worker.py JOB RESULT READY``: it also compiles
and checks its step, then makes the file READY, and waits to time it. ``python worker.py --machine
DEVICE`` prints where it would measure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import checks
import torch
from jobs import LARGEST_BATCH, Job
from largest_batch import find_largest
from machine import describe
from methods import Method, Settings, SkippedError, find_method
from models import find_workload, tiny_name
from profiler import profile
from reference import Reference, make_reference
from timing import measure, synchronize

#: Of a search's time; the last probe and the report need some.
SEARCH_SHARE = 0.7


Turn = Callable[[], float]


def run_job(
    job: Job, turn: Turn = lambda: 300.0, *, prepared: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Do a job.

    Args:
        job: what is to be measured.
        turn: waits until nothing else is measured; returns the seconds there are.
        prepared: called when nothing but the timing is left; until then others may be measured,
            or get ready too.

    Returns:
        "status" is "ok", "wrong" (no time is reported then), "skipped", "out of memory" or
        "failed"; the rest depends on it.
    """
    result: dict[str, Any] = {"job": dataclasses.asdict(job), "machine": describe(job.device)}
    try:
        if job.kind == LARGEST_BATCH:
            result |= _largest_batch(job, turn())
        else:
            result |= _measure(job, turn, prepared)
    except SkippedError as error:
        result |= {"status": "skipped", "reason": str(error)}
    except torch.OutOfMemoryError as error:
        result |= {"status": "out of memory", "reason": str(error).splitlines()[0]}
    except Exception as error:
        # Whatever a library raises is this method's result; the others still run.
        text = " ".join(str(error).split("\n")[:2])
        result |= {"status": "failed", "reason": f"{type(error).__name__}: {text}"}
        traceback.print_exc()
    return result


def _settings(job: Job) -> Settings:
    return Settings(job.device, job.autocast, job.lowering, job.optimizer)


def _measure(job: Job, turn: Turn, prepared: Callable[[], None] | None) -> dict[str, Any]:
    """Build, check, then time."""
    if prepared is None:
        turn()
    # The fastest algorithms of convolutions, for every method.
    torch.backends.cudnn.benchmark = True
    workload = find_workload(job.workload)
    method = find_method(job.method)(workload, _settings(job))
    reference = _reference(method)
    bound = reference.max_grad_norm
    found: dict[str, Any] = {"description": workload.description, "note": method.note}

    method.set_privacy(bound, 0.0)
    before = method.trained[0].detach().clone()
    start = time.perf_counter()
    method.run()
    synchronize(job.device)
    if prepared is None:
        found["first_step_s"] = time.perf_counter() - start
    print(method.plan())
    verdict = checks.compare(reference, method)
    found["check"] = dataclasses.asdict(verdict)
    if not verdict.passed:
        return found | {"status": "wrong", "reason": verdict.reason}
    if job.optimizer and torch.equal(before, method.trained[0]):
        return found | {"status": "wrong", "reason": "the step did not change the weights"}

    method.clear()
    del reference, before
    _free(job.device)
    method.set_privacy(bound, 1.0)
    if prepared is not None:
        prepared()
        turn()
    timing = measure(method, warmup=job.warmup, iterations=job.iterations)
    if method.private:
        found["noise_ratio"], reason = checks.noise_error(method, bound)
        if reason:
            return found | {"status": "wrong", "reason": reason}
    found["timing"] = dataclasses.asdict(timing)
    if job.profile:
        found["profile"] = profile(method)
    return found | {"status": "ok"}


def _reference(method: Method) -> Reference:
    """Loop over the samples on an untouched model with the same weights."""
    settings = method.settings
    model = settings.build(method.build_model())
    reference = make_reference(
        model, method.inputs, method.targets, settings, private=method.private
    )
    del model
    _free(settings.device)
    return reference


def _largest_batch(job: Job, limit_s: float) -> dict[str, Any]:
    if job.memory_limit_gib is not None and job.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        share = min(1.0, job.memory_limit_gib * 2**30 / total)
        torch.cuda.set_per_process_memory_fraction(share)
    workload, build = find_workload(job.workload), find_method(job.method)
    found = find_largest(
        lambda: build(workload, _settings(job)),
        # A batch of one has code of its own.
        start=max(3, workload.batch_size | 1),
        device=job.device,
        limit_s=SEARCH_SHARE * limit_s,
    )
    return {"status": "ok", "largest": dataclasses.asdict(found)}


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _import_ahead(job: Job) -> None:
    """Import what takes time, without a look at the device."""
    find_workload(tiny_name(job.workload)).build()
    if job.method.startswith("opacus"):
        with contextlib.suppress(ImportError):
            importlib.import_module("opacus_methods")
    if job.method.startswith(("compiled", "flashnorm")) and job.lowering == "inductor":
        importlib.import_module("torch._inductor.compile_fx")
    if job.method.startswith("flashnorm"):
        importlib.import_module("flashnorm_compile")


if __name__ == "__main__":
    if sys.argv[1] == "--machine":
        print(json.dumps(describe(sys.argv[2])))
        sys.exit()
    job_text, result_path, *ready_path = sys.argv[1:]
    asked = Job(**json.loads(job_text))
    _import_ahead(asked)
    finished = run_job(
        asked,
        lambda: float(sys.stdin.read()),  # until the process before has ended
        prepared=pathlib.Path(ready_path[0]).touch if ready_path else None,
    )
    pathlib.Path(result_path).write_text(json.dumps(finished))
