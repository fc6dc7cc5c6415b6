"""The benchmark refuses to time wrong gradients, and survives a method that fails."""

from __future__ import annotations

import dataclasses
import functools

import checks
import jobs
import methods
import models
import pytest
import report
import step
import torch
import worker
from benchmark_driver import JOB, PLACE, row
from largest_batch import search
from profiler import describe, family


def run(method: str, workload: str = JOB.workload) -> dict:
    return worker.run_job(dataclasses.replace(JOB, method=method, workload=workload))


# --- the check ------------------------------------------------------------------------------------


class OneWrongLayer(methods.Eager):
    """Right but for one small parameter."""

    def gradients(self):
        found = super().gradients()
        return found | {"norm.bias": 1.1 * found["norm.bias"]}


class Unclipped(methods.Eager):
    """The mean gradient, said to be private."""

    private = True


class Noiseless(methods.FlashNorm):
    """Ignores σ."""

    def __init__(self, workload, settings):
        super().__init__(workload, settings, "auto")

    def set_privacy(self, max_grad_norm, noise_multiplier):
        super().set_privacy(max_grad_norm, 0.0)


class NotFinite(methods.Eager):
    def gradients(self):
        return {name: torch.full_like(g, float("nan")) for name, g in super().gradients().items()}


class Frozen(methods.Eager):
    def gradients(self):
        found = super().gradients()
        del found["positions.weight"]
        return found


class WithoutUpdate(methods.Eager):
    def update(self):
        pass


@pytest.mark.parametrize("name", ["eager", "compiled", "flashnorm-auto", "vmap-eager"])
def test_a_right_step_is_timed(name):
    result = run(name)
    assert result["status"] == "ok", result.get("reason")
    assert result["timing"]["median_ms"] > 0
    assert result["check"]["gradient_error"] < 1e-5
    if name in ("flashnorm-auto", "vmap-eager"):
        assert result["check"]["norm_error"] < 1e-5
        assert abs(result["noise_ratio"] - 1) < 0.03


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (OneWrongLayer, "norm.bias"),
        (Unclipped, "gradient off by"),
        (NotFinite, "gradient off by nan"),
        (Frozen, "missing: ['positions.weight']"),
        (Noiseless, "noise has 0 times"),
        (WithoutUpdate, "did not change the weights"),
    ],
)
def test_a_wrong_step_is_not_timed(method, reason, monkeypatch):
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "compiled": method})
    result = run("compiled")
    assert result["status"] == "wrong"
    assert reason in result["reason"]
    assert "timing" not in result
    table = report.markdown([PLACE | result], "command")
    assert "| compiled | wrong:" in table


def test_the_update_may_be_left_out():
    job = dataclasses.replace(JOB, optimizer=False)
    assert worker.run_job(job)["status"] == "ok"
    settings = methods.Settings("cpu", autocast=False, optimizer=False)
    method = methods.Eager(models.find_workload(job.workload), settings)
    before = [p.clone() for p in method.trained]
    method.run()
    assert all(map(torch.equal, before, method.trained))


@pytest.mark.parametrize("name", [*map(models.tiny_name, models.WORKLOADS[2:8]), "tiny-decoder"])
def test_workloads_have_tiny_variants_that_are_right(name):
    result = run("eager", name)
    assert result["status"] == "ok", result.get("reason")
    trained = methods.Eager(models.find_workload(name), methods.Settings("cpu")).trained
    assert sum(p.numel() for p in trained) < 1_000_000


def test_a_workload_is_found_by_its_sizes():
    assert models.find_workload("gpt2-t256-b64").batch_size == 64
    assert models.tiny_name("gpt2-t256-b64") == "tiny-gpt2"
    inputs, targets = models.find_workload("tiny-gpt2-t6").inputs(3)
    assert inputs.shape == targets.shape == (3, 6)
    with pytest.raises(ValueError, match="takes the sizes"):
        models.find_workload("vit-t4")
    with pytest.raises(ValueError, match="no workload"):
        models.find_workload("gpt2-huge")


def test_norms_may_be_above_by_the_surplus_and_below_by_nothing():
    expected, near = torch.tensor([1.0, 2.0]), functools.partial(pytest.approx, abs=1e-6)
    assert checks._norm_error(expected, torch.tensor([1.02, 2.0]), 0.03) == 0
    assert checks._norm_error(expected, torch.tensor([1.04, 2.0]), 0.03) == near(0.01)
    assert checks._norm_error(expected, torch.tensor([1.0, 1.96]), 0.03) == near(0.02)
    assert checks._norm_error(expected, torch.tensor([1.0, float("nan")]), 0.03) != 0
    assert checks._norm_error(expected, torch.ones(3), 0.03) == float("inf")


# --- the largest batch ----------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 17, 40, 41, 1000])
def test_the_largest_batch_is_found(largest):
    found = search(lambda size: size <= largest, start=17, cap=10**6, in_time=lambda: True)
    assert found.ended == "memory"
    assert largest - largest // 32 <= found.batch_size <= largest


def test_no_batch_may_fit():
    found = search(lambda size: False, start=17, cap=100, in_time=lambda: True)
    assert (found.batch_size, found.ended) == (0, "memory")


def test_a_search_ends_in_time_and_at_the_cap():
    left = iter([True, True, False])
    found = search(lambda size: True, start=3, cap=1000, in_time=lambda: next(left))
    assert (found.batch_size, found.ended) == (7, "time")
    found = search(lambda size: True, start=3, cap=20, in_time=lambda: True)
    assert (found.batch_size, found.ended) == (20, "cap")


def test_an_error_ends_a_search_with_what_fitted():
    def fits(size):
        if size > 20:
            raise RuntimeError("index too large")
        return True

    found = search(fits, start=3, cap=1000, in_time=lambda: True)
    assert (found.batch_size, found.ended) == (15, "RuntimeError at 31: index too large")
    with pytest.raises(RuntimeError):
        search(fits, start=21, cap=1000, in_time=lambda: True)


@pytest.mark.parametrize("name", ["eager", "flashnorm-auto"])
def test_batches_of_several_sizes_run(name):
    result = worker.run_job(dataclasses.replace(JOB, method=name, kind=jobs.LARGEST_BATCH))
    assert result["status"] == "ok", result.get("reason")
    assert [size for size, _ in result["largest"]["probes"]] == [3, 7, 12]


def test_out_of_memory_is_no_failure_of_the_search(monkeypatch):
    def run(self):
        if len(self.inputs) > 4:
            raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(methods.Eager, "run", run)
    result = worker.run_job(dataclasses.replace(JOB, kind=jobs.LARGEST_BATCH))
    assert result["largest"]["batch_size"] == 4


# --- the report -----------------------------------------------------------------------------------


def test_the_table_gives_ratios_to_the_compiled_step():
    rows = [
        row("compiled", 10.0, 2.0),
        row("flashnorm-auto", 12.5, 1.0),
        row("opacus-ghost", 50.0, 4.0, note="another model"),
    ]
    for method, batch in (("compiled", 40), ("flashnorm-auto", 50)):
        largest = {"batch_size": batch, "ended": "memory", "probes": []}
        job = {"kind": jobs.LARGEST_BATCH, "memory_limit_gib": 24.0}
        rows.append(row(method, **job) | {"largest": largest})
    table = report.markdown(rows, "the command")
    ours = "12.50 (12.50-12.50) | 1.25 | 1.00 | 0.50 | 25.0 | 1.25 | 1.0e-03 | 50 | 1.25 | 0123abc"
    assert f"| flashnorm-auto | {ours} |" in table
    assert "largest B in 24 GiB" in table
    assert "| opacus-ghost [1] | 50.00" in table
    assert "[1] another model" in table
    assert "a model; fp32; graphs run as they are (eager); a GPU, torch 2, cuda 13." in table


def test_results_of_two_machines_are_not_compared():
    rows = [
        row("compiled", 10.0),
        row("flashnorm-auto", 5.0, machine={"device": "another GPU", "torch": "2"}),
    ]
    assert "| 0.50 |" not in report.markdown(rows, "the command")


def test_the_classic_comparison_is_against_standard_dp_sgd():
    workload = "tiny-gpt2-untied"
    rows = [
        row("vmap-eager", 100.0, 50.0, workload=workload),
        row("flashnorm-ghost-library", 20.0, 5.0, workload=workload),
    ]
    table = report.markdown(rows, "the command")
    assert "| standard DP-SGD | vmap-eager | 100.0 | 1.0× | 50.00 | 1.0× |" in table
    assert "| ghost | flashnorm-ghost-library | 20.0 | 5.0× | 5.00 | 10.0× |" in table
    assert "flash:" in table


def test_saved_results_make_the_report_again(tmp_path):
    name = models.WORKLOADS[0]
    rows = [row("compiled", 10.0, 2.0, workload=name), row("eager", 20.0, 3.0, workload=name)]
    for b in (3, 6):
        rows += [row(method, b, workload=f"tiny-gpt2-t8-b{b}") for method in ("compiled", "eager")]
    report.save(tmp_path, rows, "the command")
    saved, again = str(tmp_path / "results.json"), tmp_path / "again"
    assert step.main(["--from", saved, "--output", str(again)]) == 0
    assert f"| {name} | 10.0 | 2.00 | 2.00, 1.50 |" in (again / "table.md").read_text()
    for picture in ("ratios.png", "sweep-b.png"):
        assert (again / picture).read_bytes().startswith(b"\x89PNG")


def test_kernels_fall_into_families():
    kernels = [
        ["nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", 10.0, 5.0],
        ["_add_noise_kernel", 3.0, 0.5],
        ["triton_red_fused_native_layer_norm_3", 3.0, 0.4],
        ["pytorch_flash::flash_fwd_kernel", 3.0, 0.3],
        ["triton_poi_fused_convert_element_type_embedding_2", 1.0, 0.2],
        ["void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", 4.0, 0.1],
    ]
    assert [family(name) for name, *_ in kernels] == [
        "matrix product",
        "noise",
        "triton reduction",
        "attention",
        "triton pointwise",
        "optimizer",
    ]
    text = describe(
        {
            "compiled": {"kernels": kernels[:1], "busy_ms": 5.0, "span_ms": 6.0},
            "flashnorm-auto": {"kernels": kernels, "busy_ms": 6.5, "span_ms": 7.0},
        }
    )
    assert "noise" in text
    assert "+1.50" in text
