"""Time and memory of a private training step, beside other ways to take one.

    python benchmarks/step.py --everything            # all of it, on one GPU
    python benchmarks/step.py --workload gpt2-t1024-b16 --methods compiled flashnorm-auto
    python benchmarks/step.py --everything --resume --total-limit 560   # in several leases

Every method runs in a process of its own, is checked against a loop over samples, and only then
timed. Results are written after every method, so that an interrupted run keeps what it has; the
report (table.md and plots) is made of them. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import machine
import report
from groups import BASELINE
from jobs import URGENT, Job, is_known, make_jobs, merged
from methods import SLOW, method_names
from models import WORKLOADS, find_workload, tiny_name
from sweeps import CLASSIC_ROWS, SWEEP_METHODS, SWEEPS, classic_workload
from workers import Workers
from workers import machine as find_machine

DEFAULT_METHODS = tuple(itertools.chain(*URGENT))
MORE_METHODS = (
    "flashnorm-flash", "compiled-reduce-overhead", "flashnorm-reduce-overhead", "vmap",
)  # fmt: skip
# Less than this cannot even import torch.
SHORTEST_RUN_S = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a method's gradients were wrong."""
    options = _parse(arguments)
    command = "python benchmarks/step.py " + shlex.join(
        sys.argv[1:] if arguments is None else arguments
    )
    if options.render:
        saved = json.loads(options.render.read_text())
        report.write(options.output, saved["results"], saved["command"])
        return _finish(saved["results"], saved["command"])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "log.txt").write_text("")
    deadline = time.monotonic() + options.total_limit
    results = _earlier(options)
    place = {"machine": find_machine(options.device), "commit": options.commit or machine.commit()}
    jobs = [
        job
        for job in _jobs(options)
        if not is_known(job, results, place, options.time_limit)
    ]
    try:
        measured = [job for job in jobs if not _is_left_out(job, options)]
        with Workers(
            measured, options.output, dump_code=options.dump_code, together=options.together
        ) as workers:
            for job in jobs:
                limit = min(options.time_limit, deadline - time.monotonic())
                result = place | _run(job, workers, options, limit)
                results = merged(results, result)
                print(report.one_line(result, results), flush=True)
                report.save(options.output, results, command)
    finally:
        report.write(options.output, results, command)
    return _finish(results, command)


def _finish(results: list[dict[str, Any]], command: str) -> int:
    print(f"\n{report.markdown(results, command)}")
    return int(any(result["status"] == "wrong" for result in results))


def _earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.resume is None:
        return []
    here = options.resume == pathlib.Path()
    path = options.output / "results.json" if here else options.resume
    return json.loads(path.read_text())["results"] if path.exists() else []


def _jobs(options: argparse.Namespace) -> list[Job]:
    """Return what was asked for, sweeps last."""
    known = method_names()
    compared = list(itertools.product(options.workload, options.methods))
    if options.classic:
        methods = [method for row in CLASSIC_ROWS.values() for method in row if method in known]
        compared += itertools.product([classic_workload(smoke=options.smoke)], methods)
    methods = [method for method in SWEEP_METHODS if method in known]
    swept: list[tuple[str, str]] = []
    for name in options.sweep:
        points = SWEEPS[name].points(smoke=options.smoke)
        swept += itertools.product(points.values(), methods)
    jobs = make_jobs(compared, options, largest_for=options.workload)
    return list(dict.fromkeys([*jobs, *make_jobs(swept, options)]))


def _is_left_out(job: Job, options: argparse.Namespace) -> bool:
    return options.skip_slow and job.method in SLOW


def _run(job: Job, workers: Workers, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    skipped = {"job": dataclasses.asdict(job), "status": "skipped"}
    if _is_left_out(job, options):
        return skipped | {"reason": "--skip-slow"}
    if limit < SHORTEST_RUN_S:
        return skipped | {"reason": "--total-limit is used up"}
    return workers.run(job, limit) | {"limit_s": limit}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to compare").add_argument
    what("--workload", nargs="+", metavar="W", help=f"of models.py: {', '.join(WORKLOADS)} (all)")
    what("--methods", nargs="+", default=list(DEFAULT_METHODS), choices=[*method_names(), "all"],
         metavar="M", help=f"of {', '.join(method_names())}; ratios need {BASELINE}")  # fmt: skip
    what("--largest-batch", action="store_true", help="find the largest batch that fits")
    what("--memory-limit", type=float, default=40.0, metavar="GIB",
         help="memory for --largest-batch (default: %(default)s)")  # fmt: skip
    what("--classic", action="store_true", help="standard DP-SGD, ghost, flash, flash + fused")
    what("--sweep", nargs="+", default=[], choices=list(SWEEPS), help="cost against T, B and d")
    what("--everything", action="store_true",
         help="all workloads, --largest-batch, --classic, --sweep t b d, and the methods "
         f"{', '.join(MORE_METHODS)} too")  # fmt: skip
    what("--smoke", action="store_true",
         help="tiny workloads and few iterations; one workload if none is named")  # fmt: skip
    how = parser.add_argument_group("how to measure").add_argument
    how("--device", default="cuda", choices=["cuda", "cpu"])
    how("--precision", default="bf16", choices=["bf16", "fp32"], help="bf16 is autocast")
    how("--lowering", choices=["inductor", "eager"],
        help="eager runs captured graphs as they are (default: inductor, but eager for --smoke on "
        "a CPU, where C++ takes minutes to compile)")  # fmt: skip
    how("--no-optimizer", dest="optimizer", action="store_false", help="leave AdamW out")
    how("--warmup", type=int, default=5)
    how("--iterations", type=int, default=20)
    how("--profile", action="store_true", help="write the kernels of compiled and flashnorm")
    how("--dump-code", action="store_true", help="write the code Inductor makes for flashnorm")
    when = parser.add_argument_group("in how much time").add_argument
    when("--time-limit", type=float, default=300.0, help="seconds per method and workload")
    when("--total-limit", type=float, default=float("inf"), help="seconds for all of it")
    when("--together", type=int, default=1, metavar="N",
         help="N methods compile and are checked at the same time, then timed one by one (first "
         "steps are not timed then)")  # fmt: skip
    when("--skip-slow", action="store_true", help=f"skip {', '.join(SLOW)}: minutes to compile")
    when("--resume", nargs="?", type=pathlib.Path, const=pathlib.Path(), metavar="RESULTS",
         help="keep earlier results, and skip what was measured at this commit on a machine like "
         "this one (default: those of --output)")  # fmt: skip
    where = parser.add_argument_group("report").add_argument
    where("--output", type=pathlib.Path, default=pathlib.Path("runs/step"))
    where("--from", dest="render", type=pathlib.Path, metavar="RESULTS",
          help="make the report from saved results, and measure nothing")  # fmt: skip
    where("--commit", help="what the sources are called; default: git's answer")
    options = parser.parse_args(arguments)
    _complete(options, parser)
    return options


def _complete(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in what other options imply."""
    if options.everything:
        options.workload = ["all"]
        options.methods = [*options.methods, *MORE_METHODS]
        options.largest_batch = options.classic = True
        options.sweep = list(SWEEPS)
    if options.smoke:
        options.warmup, options.iterations = 1, 3
    if options.lowering is None:
        quick = options.smoke and options.device == "cpu"
        options.lowering = "eager" if quick else "inductor"
    default = WORKLOADS[:1] if options.smoke else WORKLOADS
    if options.workload is None:
        alone = (options.classic or options.sweep) and not options.largest_batch
        options.workload = [] if alone else default
    if "all" in options.workload:
        options.workload = WORKLOADS
    if "all" in options.methods:
        options.methods = list(method_names())
    try:
        if options.smoke:
            options.workload = [tiny_name(name) for name in options.workload]
        options.workload = list(dict.fromkeys(options.workload))
        for name in options.workload:
            find_workload(name)
    except (ValueError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    # As an exception, so that the worker ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
