"""Measures one method on one workload; a process of its own, so that memory starts clean.

``python worker.py JOB RESULT``: JOB is a ``Job`` in JSON, RESULT the path of the JSON to write.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import pathlib
import platform
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

import checks
import torch
from methods import METHODS, Method, Settings, SkippedError
from models import find_workload
from profiler import profile
from timing import measure, synchronize


@dataclass(frozen=True)
class Job:
    """What to measure; see ``step.py`` for the meaning of the options."""

    workload: str
    method: str
    device: str
    autocast: bool = True
    lowering: str = "inductor"
    warmup: int = 5
    iterations: int = 20
    profile: bool = False


def run_job(job: Job) -> dict[str, Any]:
    """Build, check, then time.

    Returns:
        "status" is "ok", "wrong" (no time is reported then), "skipped", "out of memory" or
        "failed"; the rest depends on it.
    """
    result: dict[str, Any] = {"job": dataclasses.asdict(job), "machine": _machine(job.device)}
    try:
        result |= _measure(job)
    except SkippedError as error:
        result |= {"status": "skipped", "reason": str(error)}
    except torch.cuda.OutOfMemoryError as error:
        result |= {"status": "out of memory", "reason": str(error).splitlines()[0]}
    except Exception as error:
        # Whatever a library raises is this method's result; the others still run.
        text = " ".join(str(error).split("\n")[:2])
        result |= {"status": "failed", "reason": f"{type(error).__name__}: {text}"}
        traceback.print_exc()
    return result


def _measure(job: Job) -> dict[str, Any]:
    settings = Settings(job.device, job.autocast, job.lowering)
    workload = find_workload(job.workload)
    method = METHODS[job.method](workload, settings)
    reference = _reference(method)
    bound = reference.max_grad_norm
    found: dict[str, Any] = {"description": workload.description, "note": method.note}

    method.set_privacy(bound, 0.0)
    method.prepare()
    start = time.perf_counter()
    method.run()
    synchronize(job.device)
    found["first_step_s"] = time.perf_counter() - start
    verdict = checks.compare(reference, method)
    found["check"] = dataclasses.asdict(verdict)
    if not verdict.passed:
        return found | {"status": "wrong", "reason": verdict.reason}

    method.prepare()
    del reference
    _free(job.device)
    method.set_privacy(bound, 1.0)
    timing = measure(method, warmup=job.warmup, iterations=job.iterations)
    if method.private:
        ratio = checks.noise_ratio(method, bound)
        found["noise_ratio"] = ratio
        if not abs(ratio - 1.0) <= checks.NOISE_TOLERANCE:
            reason = f"noise has {ratio:.3g} times the standard deviation that it must have"
            return found | {"status": "wrong", "reason": reason}
    found["timing"] = dataclasses.asdict(timing)
    if job.profile:
        found["profile"] = profile(method)
    return found | {"status": "ok"}


def _reference(method: Method) -> checks.Reference:
    """Loop over the samples on an untouched model with the same weights."""
    settings = method.settings
    model = settings.build(method.build_model())
    reference = checks.make_reference(
        model, method.inputs, method.targets, settings, private=method.private
    )
    del model
    _free(settings.device)
    return reference


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _machine(device: str) -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    else:
        found["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def _import_ahead(job: Job) -> None:
    """Import what takes time, without a look at the device."""
    if job.method != "eager" and job.lowering == "inductor":
        importlib.import_module("torch._inductor.compile_fx")
    if job.method.startswith("flashnorm"):
        importlib.import_module("flashnorm_compile")


if __name__ == "__main__":
    job_text, result_path = sys.argv[1:]
    _import_ahead(Job(**json.loads(job_text)))
    sys.stdin.read()  # until the process before has ended
    finished = run_job(Job(**json.loads(job_text)))
    pathlib.Path(result_path).write_text(json.dumps(finished))
