"""What the benchmark measures, in which order and beside what, and what it keeps."""

from __future__ import annotations

import dataclasses
import functools
import json

import jobs
import models
import step
import worker
import workers
from benchmark_driver import JOB, PLACE, row


def test_what_matters_comes_first():
    options = step._parse(["--workload", "bert", "vit", "--methods", "compiled", "opacus-ghost",
                           "flashnorm-auto", "--largest-batch"])  # fmt: skip
    order = [(job.workload, job.method, job.kind) for job in step._jobs(options)]
    assert order[:4] == [
        ("bert", "compiled", jobs.STEP),
        ("bert", "flashnorm-auto", jobs.STEP),
        ("vit", "compiled", jobs.STEP),
        ("vit", "flashnorm-auto", jobs.STEP),
    ]
    assert {kind for _, _, kind in order[4:8]} == {jobs.LARGEST_BATCH}
    assert {method for _, method, _ in order[8:]} == {"opacus-ghost"}


def test_everything_holds_each_job_once():
    found = step._jobs(step._parse(["--everything"]))
    assert len(found) == len(set(found))
    assert {job.workload for job in found} > {*models.WORKLOADS, "gpt2-untied-t128-b64"}
    for job in found:
        models.find_workload(job.workload)


def test_known_results_are_those_of_this_commit_and_machine():
    known = functools.partial(jobs.is_known, results=[row("eager")], time_limit=300.0)
    assert known(JOB, place=PLACE)
    assert not known(JOB, place=PLACE | {"commit": "another"})
    assert not known(JOB, place=PLACE | {"machine": {"device": "another", "torch": "2"}})
    assert not known(dataclasses.replace(JOB, iterations=7), place=PLACE)
    for status, limit, final in (
        ("skipped", 300.0, False), ("timeout", 100.0, False), ("timeout", 300.0, True)
    ):  # fmt: skip
        results = [row("eager", status=status) | {"limit_s": limit}]
        if status == "skipped":
            del results[0]["limit_s"]
        assert jobs.is_known(JOB, results, PLACE, time_limit=300.0) is final


def test_a_new_result_takes_the_place_of_the_old_one():
    old, other = row("eager", 1.0, commit="old"), row("compiled")
    new = row("eager", 2.0, iterations=9)
    assert jobs.merged([old, other], new) == [other, new]
    elsewhere = new | {"machine": {"device": "another GPU", "torch": "2"}}
    assert jobs.merged([old, other], elsewhere) == [old, other, elsewhere]
    skipped = {**PLACE, "job": old["job"], "status": "skipped", "reason": "no time"}
    assert jobs.merged([old, other], skipped) == [old, other]


def test_one_failing_method_does_not_stop_the_others(tmp_path, capsys):
    arguments = ["--smoke", "--device", "cpu", "--precision", "fp32", "--output", str(tmp_path)]
    status = step.main([*arguments, "--methods", "vmap", "eager", "--skip-slow"])
    assert status == 0
    skipped, eager = sorted(
        json.loads((tmp_path / "results.json").read_text())["results"],
        key=lambda result: result["status"], reverse=True,
    )  # fmt: skip
    assert skipped["status"] == "skipped"
    assert eager["status"] == "ok"
    assert eager["commit"]
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_methods_may_compile_together_and_are_timed_one_by_one(tmp_path, capsys):
    arguments = ["--smoke", "--device", "cpu", "--precision", "fp32", "--together", "3"]
    assert step.main([*arguments, "--output", str(tmp_path),
                      "--methods", "eager", "vmap-eager", "opacus-hooks"]) == 0  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    by_method = {result["job"]["method"]: result for result in results}
    for name in ("eager", "vmap-eager"):
        assert by_method[name]["status"] == "ok", by_method[name]
        assert by_method[name]["timing"]["median_ms"] > 0
        # It shared the processors.
        assert "first_step_s" not in by_method[name]
    assert "first step" not in capsys.readouterr().out.split("| method")[0]


FAKE_WORKER = """
import json, pathlib, sys, time
job = json.loads(sys.argv[1])
if job["method"] == "stuck":
    time.sleep(1000)
if job["kind"] == "step":
    pathlib.Path(sys.argv[3]).touch()
seconds = float(sys.stdin.read())
status = "out of memory" if job["method"] == "large" else "ok"
pathlib.Path(sys.argv[2]).write_text(json.dumps({"job": job, "status": status, "s": seconds}))
"""


def test_who_is_not_ready_in_time_is_ended_before_others_are_timed(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE_WORKER)
    monkeypatch.setattr(workers, "_WORKER", str(tmp_path / "fake.py"))
    first, stuck, large, other = (
        dataclasses.replace(JOB, method=name) for name in ("first", "stuck", "large", "other")
    )
    search = dataclasses.replace(JOB, method="first", kind=jobs.LARGEST_BATCH)
    order = [first, stuck, large, search, other]
    with workers.Workers(order, tmp_path, dump_code=False, together=4) as running:
        result = running.run(first, 5.0)
        assert (result["status"], result["s"] < 2.0) == ("ok", True)
        # Neither the one that is stuck nor what comes behind the search has been started.
        assert list(running._ready) == [large]
        assert running.run(stuck, 5.0)["status"] == "timeout"
        # Alone there may be room: --resume tries again.
        assert running.run(large, 5.0)["status"] == "skipped"
        assert running.run(search, 5.0)["status"] == "ok"
        assert running.run(other, 5.0)["status"] == "ok"


def test_nothing_is_timed_before_its_turn():
    order = []

    def turn():
        order.append("turn")
        return 300.0

    result = worker.run_job(JOB, turn, prepared=lambda: order.append("prepared"))
    assert result["status"] == "ok"
    assert order == ["prepared", "turn"]
