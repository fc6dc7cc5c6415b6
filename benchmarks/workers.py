"""The processes that measure: one a job, one at a time, each ended at its limit."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from jobs import STEP, Job

#: Of a job's time: what is left is for timing it.
PREPARING_SHARE = 0.8
_WORKER = str(pathlib.Path(__file__).with_name("worker.py"))


def machine(device: str) -> dict[str, str]:
    """Return what a worker would measure on; this process does not touch the device."""
    command = [sys.executable, _WORKER, "--machine", device]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


class Workers(contextlib.ExitStack):
    """One process a job. The next one imports what it needs while one is measured, and waits.

    Args:
        jobs: in the order in which they will be run.
        output: folder of the log.
        dump_code: whether to write Inductor's code of flashnorm there.
        together: so many compile and check at the same time, before the first of them is timed.
    """

    def __init__(
        self, jobs: Sequence[Job], output: pathlib.Path, *, dump_code: bool, together: int = 1
    ) -> None:
        super().__init__()
        self.jobs = jobs
        self.output = output
        self.dump_code = dump_code
        self.together = together
        self._ready: dict[Job, subprocess.Popen[str]] = {}
        self._late: set[Job] = set()
        self._folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self._log = self.enter_context((output / "log.txt").open("a"))
        self.callback(self._end)

    def run(self, job: Job, limit_s: float) -> dict[str, Any]:
        """Return a job's result; "timeout" or "failed" where its process left none."""
        deadline = time.monotonic() + limit_s
        if self.together > 1:
            self._prepare(job, PREPARING_SHARE * limit_s)
        if job in self._late:
            reason = f"not ready within {PREPARING_SHARE * limit_s:.0f} s"
            return {"job": dataclasses.asdict(job), "status": "timeout", "reason": reason}
        limit_s = deadline - time.monotonic()
        process = self._started(job)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(str(limit_s))
            process.stdin.close()
        if self.together == 1:
            position = self.jobs.index(job)
            for following in self.jobs[position + 1 : position + 2]:
                self._started(following)
        try:
            status: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
        self._end(job)
        path = self._place(job) / "result.json"
        if path.exists():
            return self._judged(json.loads(path.read_text()))
        result: dict[str, Any] = {"job": dataclasses.asdict(job)}
        if status is None:
            return result | {"status": "timeout", "reason": f"no result within {limit_s:.0f} s"}
        return result | {"status": "failed", "reason": f"exit status {status}"}

    def _prepare(self, job: Job, limit_s: float) -> None:
        """Start the jobs that get ready together; end those that are not ready in time.

        A search for the largest batch needs the memory for itself.
        """
        if job in self._ready or job in self._late or job.kind != STEP:
            return
        following = self.jobs[self.jobs.index(job) :]
        group = list(itertools.takewhile(lambda each: each.kind == STEP, following))
        waiting = {each: self._started(each) for each in group[: self.together]}
        deadline = time.monotonic() + limit_s
        while waiting and time.monotonic() < deadline:
            time.sleep(0.1)
            waiting = {
                each: process
                for each, process in waiting.items()
                if process.poll() is None and not (self._place(each) / "ready").exists()
            }
        if waiting:
            # Nothing is timed beside them.
            self._late |= waiting.keys()
            self._end(*waiting)

    def _judged(self, result: dict[str, Any]) -> dict[str, Any]:
        """Leave open what a method needs that found no room beside others."""
        if self.together > 1 and result["status"] == "out of memory":
            return result | {"status": "skipped", "reason": "out of memory beside other methods"}
        return result

    def _place(self, job: Job) -> pathlib.Path:
        return self._folder / str(self.jobs.index(job))

    def _started(self, job: Job) -> subprocess.Popen[str]:
        if job not in self._ready:
            place = self._place(job)
            place.mkdir()
            job_text = json.dumps(dataclasses.asdict(job))
            ready = [str(place / "ready")] if self.together > 1 else []
            print(f"==== {job.kind}: {job.workload} {job.method}", file=self._log, flush=True)
            self._ready[job] = subprocess.Popen(
                [sys.executable, _WORKER, job_text, str(place / "result.json"), *ready],
                env=self._environment(job), stdin=subprocess.PIPE, stdout=self._log,
                stderr=subprocess.STDOUT, start_new_session=True, text=True,
            )  # fmt: skip
        return self._ready[job]

    def _environment(self, job: Job) -> dict[str, str]:
        environment = dict(os.environ)
        if job.device == "cuda":
            # A first step compiles everything: nobody finds what another process has compiled.
            for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
                environment[name] = str(self._place(job) / name.lower())
        if self.dump_code and job.method.startswith("flashnorm"):
            name = f"code-{job.workload}-{job.method}.txt"
            environment |= {
                "TORCH_LOGS": "output_code",
                "TORCH_LOGS_OUT": str((self.output / name).absolute()),
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
