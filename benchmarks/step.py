"""Time and memory of a private training step, beside other ways to get one.

    python benchmarks/step.py --workload gpt2-t1024-b16 --device cuda --output runs/step

Every method runs in a process of its own, is checked against a loop over samples, and only then
timed. Results are written after every method, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import report
from methods import METHODS, SLOW
from models import find_workload
from worker import Job

DEFAULT_METHODS = ("compiled", "flashnorm-auto", "opacus-ghost", "opacus-hooks")
# Less than this cannot even import torch.
SHORTEST_RUN_S = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a method's gradients were wrong."""
    options = _parse(arguments)
    command = "python benchmarks/step.py " + shlex.join(
        sys.argv[1:] if arguments is None else arguments
    )
    deadline = time.monotonic() + options.total_limit
    results: list[dict[str, Any]] = []
    with _Workers(_jobs(options), options) as workers:
        for job in workers.jobs:
            limit = min(options.time_limit, deadline - time.monotonic())
            result = _run(job, workers, options, limit)
            results.append(result)
            rows = [row for row in results if row["job"]["workload"] == job.workload]
            print(report.one_line(result, rows), flush=True)
            report.write(options.output, results, command)
    print(f"\n{report.markdown(results, command)}")
    return int(any(result["status"] == "wrong" for result in results))


def _jobs(options: argparse.Namespace) -> list[Job]:
    return [
        Job(
            workload=workload,
            method=method,
            device=options.device,
            autocast=options.precision == "bf16",
            lowering=options.lowering,
            warmup=options.warmup,
            iterations=options.iterations,
            profile=options.profile and (method == "compiled" or method.startswith("flashnorm")),
        )
        for workload in options.workload
        for method in options.methods
    ]


def _run(
    job: Job, workers: _Workers, options: argparse.Namespace, limit: float
) -> dict[str, Any]:
    result: dict[str, Any] = {"job": dataclasses.asdict(job)}
    if options.skip_slow and job.method in SLOW:
        return result | {"status": "skipped", "reason": "--skip-slow"}
    if limit < SHORTEST_RUN_S:
        return result | {"status": "skipped", "reason": "--total-limit is used up"}
    status, text = workers.run(job, limit)
    if text is not None:
        return json.loads(text)
    reason = f"no result within {limit:.0f} s" if status is None else f"exit status {status}"
    return result | {"status": "timeout" if status is None else "failed", "reason": reason}


class _Workers(contextlib.ExitStack):
    """One process a job. The next one imports what it needs while one is measured, and waits."""

    def __init__(self, jobs: Sequence[Job], options: argparse.Namespace) -> None:
        super().__init__()
        self.jobs = jobs
        self.options = options
        self._ready: dict[Job, subprocess.Popen[bytes]] = {}
        self._folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self._log = self.enter_context((options.output / "log.txt").open("a"))
        self.callback(self._end)

    def run(self, job: Job, limit: float) -> tuple[int | None, str | None]:
        """Return a job's exit status (None where it was ended at the limit), and its result."""
        process = self._started(job)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        position = self.jobs.index(job)
        for following in self.jobs[position + 1 : position + 2]:
            self._started(following)
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        self._end(job)
        path = self._result(job)
        return status, path.read_text() if path.exists() else None

    def _result(self, job: Job) -> pathlib.Path:
        return self._folder / f"{job.workload}-{job.method}.json"

    def _started(self, job: Job) -> subprocess.Popen[bytes]:
        if job not in self._ready:
            worker = pathlib.Path(__file__).with_name("worker.py")
            job_text = json.dumps(dataclasses.asdict(job))
            print(f"==== {job.workload} {job.method}", file=self._log, flush=True)
            self._ready[job] = subprocess.Popen(
                [sys.executable, str(worker), job_text, str(self._result(job))],
                env=self._environment(job), stdin=subprocess.PIPE, stdout=self._log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return self._ready[job]

    def _environment(self, job: Job) -> dict[str, str]:
        environment = dict(os.environ)
        if self.options.dump_code and job.method.startswith("flashnorm"):
            name = f"code-{job.workload}-{job.method}.txt"
            environment |= {
                "TORCH_LOGS": "output_code",
                "TORCH_LOGS_OUT": str((self.options.output / name).absolute()),
                # A graph that comes out of the cache is not printed.
                "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
            }
        return environment

    def _end(self, *jobs: Job) -> None:
        """End jobs, or all, and their children."""
        for job in jobs or tuple(self._ready):
            process = self._ready.pop(job)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workload", nargs="+", default=["gpt2-t1024-b16"], help="names, see models.py")
    add("--methods", nargs="+", default=list(DEFAULT_METHODS), choices=list(METHODS), metavar="M",
        help=f"of {', '.join(METHODS)}; ratios need {report.BASELINE}")  # fmt: skip
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--precision", default="bf16", choices=["bf16", "fp32"], help="bf16 is autocast")
    add("--lowering", default="inductor", choices=["inductor", "eager"])
    add("--warmup", type=int, default=5)
    add("--iterations", type=int, default=20)
    add("--time-limit", type=float, default=300.0, help="seconds per method and workload")
    add("--total-limit", type=float, default=float("inf"), help="seconds for all of it")
    add("--skip-slow", action="store_true", help=f"skip {', '.join(SLOW)}: minutes to compile")
    add("--profile", action="store_true", help="write the kernels of compiled and flashnorm")
    add("--dump-code", action="store_true", help="write the code Inductor makes for flashnorm")
    add("--smoke", action="store_true", help="a tiny workload and few iterations")
    add("--output", type=pathlib.Path, default=pathlib.Path("runs/step"))
    options = parser.parse_args(arguments)
    if options.smoke:
        options.workload, options.warmup, options.iterations = ["tiny-t16-b4"], 1, 3
    for name in options.workload:
        try:
            find_workload(name)
        except (ValueError, ImportError) as error:
            parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "log.txt").write_text("")
    return options


if __name__ == "__main__":
    # As an exception, so that the worker ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
