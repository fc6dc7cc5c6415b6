"""The benchmark refuses to time wrong gradients, and survives a method that fails."""

from __future__ import annotations

import functools
import json
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import checks
import methods
import step
import worker
from profiler import describe, family
from report import markdown

JOB = {
    "workload": "tiny-t6-b3",
    "device": "cpu",
    "autocast": False,
    "lowering": "eager",
    "warmup": 0,
    "iterations": 1,
}


def run(method: str) -> dict:
    return worker.run_job(worker.Job(method=method, **JOB))


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


def test_a_right_private_step_is_timed():
    result = run("flashnorm-auto")
    assert result["status"] == "ok", result.get("reason")
    assert result["timing"]["median_ms"] > 0
    assert result["check"]["gradient_error"] < 1e-5
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
    ],
)
def test_a_wrong_step_is_not_timed(method, reason, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "compiled", method)
    result = run("compiled")
    assert result["status"] == "wrong"
    assert reason in result["reason"]
    assert "timing" not in result
    table = markdown([result], "command")
    assert "| compiled | wrong:" in table


def test_the_table_gives_ratios_to_the_compiled_step():
    def row(method, ms, gib, **more):
        timing = {"median_ms": ms, "min_ms": ms, "max_ms": ms, "iterations": 1}
        timing["peak_bytes"] = int(gib * 2**30)
        return {
            "job": {**JOB, "method": method},
            "status": "ok",
            "timing": timing,
            "first_step_s": 1.0,
            "check": {"gradient_error": 0.001},
            "description": "a model",
            "machine": {"device": "a GPU", "torch": "2"},
            **more,
        }

    rows = [
        row("compiled", 10.0, 2.0),
        row("flashnorm-auto", 12.5, 1.0),
        row("opacus-ghost", 50.0, 4.0, note="another model"),
    ]
    table = markdown(rows, "the command")
    assert "| flashnorm-auto | 12.50 (12.50-12.50) | 1.25 | 1.00 | 0.50 |" in table
    assert "| opacus-ghost [1] | 50.00" in table
    assert "[1] another model" in table
    assert "a model; fp32; graphs run as they are (eager); a GPU, torch 2." in table


def test_one_failing_method_does_not_stop_the_others(tmp_path, capsys):
    arguments = ["--smoke", "--device", "cpu", "--precision", "fp32", "--lowering", "eager"]
    status = step.main(
        [*arguments, "--methods", "vmap", "opacus-ghost", "eager", "--skip-slow",
         "--output", str(tmp_path)]
    )  # fmt: skip
    assert status == 0
    skipped, _, eager = json.loads((tmp_path / "results.json").read_text())["results"]
    assert skipped["status"] == "skipped"
    assert eager["status"] == "ok"
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_kernels_fall_into_families():
    kernels = [
        ["nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", 10.0, 5.0],
        ["_add_noise_kernel", 3.0, 0.5],
        ["triton_red_fused_native_layer_norm_3", 3.0, 0.4],
        ["pytorch_flash::flash_fwd_kernel", 3.0, 0.3],
        ["triton_poi_fused_convert_element_type_embedding_2", 1.0, 0.2],
    ]
    assert [family(name) for name, *_ in kernels] == [
        "matrix product",
        "noise",
        "triton reduction",
        "attention",
        "triton pointwise",
    ]
    text = describe(
        {
            "compiled": {"kernels": kernels[:1], "busy_ms": 5.0, "span_ms": 6.0},
            "flashnorm-auto": {"kernels": kernels, "busy_ms": 6.4, "span_ms": 7.0},
        }
    )
    assert "noise" in text
    assert "+1.40" in text


def test_norms_may_be_above_by_the_surplus_and_below_by_nothing():
    expected, near = torch.tensor([1.0, 2.0]), functools.partial(pytest.approx, abs=1e-6)
    assert checks._norm_error(expected, torch.tensor([1.02, 2.0]), 0.03) == 0
    assert checks._norm_error(expected, torch.tensor([1.04, 2.0]), 0.03) == near(0.01)
    assert checks._norm_error(expected, torch.tensor([1.0, 1.96]), 0.03) == near(0.02)
    assert checks._norm_error(expected, torch.tensor([1.0, float("nan")]), 0.03) != 0
    assert checks._norm_error(expected, torch.ones(3), 0.03) == float("inf")
