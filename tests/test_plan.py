"""Which strategy is chosen, what the choice is based on, and how it is shown."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from driver import Case, check_case, private_step
from torch import nn

import flashnorm_compile as fn
from flashnorm_compile.passes.cost import Cost, Device


def linear_step(**options):
    return private_step(lambda model, x: model(x).square().mean(), **options)


def plan_of(model: nn.Module, x: torch.Tensor, **options):
    step = linear_step(**options)
    step(model, x)
    return step.plan


def strategies(plan) -> dict[str, str]:
    return {row.parameter: row.strategy for row in plan.rows}


def test_few_tokens_of_wide_layers_get_ghost_norms_and_many_of_narrow_ones_do_not():
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    assert strategies(plan_of(model, torch.randn(8, 2, 512))) == {"model.0.weight": "ghost"}
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    assert strategies(plan_of(model, torch.randn(8, 300, 8))) == {"model.0.weight": "materialize"}


def test_what_is_chosen_costs_the_least():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    x = torch.randn(8, 16, 64)
    auto, *forced = (plan_of(model, x, strategy=s) for s in ("auto", "materialize", "ghost"))
    for row, *others in zip(auto.rows, *(plan.rows for plan in forced), strict=True):
        assert row.cost.seconds == min(other.cost.seconds for other in others)


def test_a_memory_budget_is_kept_where_it_costs_the_least_time():
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 64, bias=False))
    x = torch.randn(8, 12, 32)
    plan = plan_of(model, x, strategy="materialize")
    kept = {row.parameter: row.cost.kept for row in plan.rows}
    assert kept == {"model.0.weight": 4 * 8 * 32 * 32, "model.1.weight": 4 * 8 * 32 * 64}

    unlimited = plan_of(model, x)
    total = sum(row.cost.kept for row in unlimited.rows)
    assert strategies(plan_of(model, x, memory_budget=total)) == strategies(unlimited)
    assert strategies(unlimited)["model.1.weight"] == "materialize"
    less = plan_of(model, x, memory_budget=total - 1)
    assert sum(row.cost.kept for row in less.rows) <= total - 1
    assert strategies(less)["model.1.weight"] == "ghost"


def test_gradients_are_right_under_a_memory_budget():
    check_case(
        Case(
            "budget",
            lambda: nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 64)),
            lambda b: (torch.randn(b, 12, 32),),
            lambda model, x: model(x).square().mean(),
        ),
        "auto",
        memory_budget=60_000,
    )


def test_a_budget_that_nothing_meets_is_refused():
    with pytest.raises(
        fn.PrivacyError,
        match=r"memory_budget=100 is less than any strategy keeps until the clipping factors are "
        r"known, 1024 bytes for the batch that was traced",
    ):
        plan_of(nn.Linear(8, 8, bias=False), torch.randn(4, 11, 8), memory_budget=100)


@pytest.mark.parametrize("value", [-1, float("nan"), "1 GiB", True])
def test_a_budget_is_a_number(value):
    with pytest.raises(fn.PrivacyError, match=r"option memory_budget=.* is not valid"):
        linear_step(memory_budget=value)


def test_the_plan_prints_what_was_decided():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(x)

    step = private_step(lambda model, x, y: F.cross_entropy(model(x), y))
    step(Classifier(), torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    header, weight, bias = str(step.plan).splitlines()
    assert re.split("  +", header) == [
        "parameter", "shape", "sites", "axis", "strategy", "kernels", "µs", "MFLOP", "MB",
        "kept MB", "source",
    ]  # fmt: skip
    assert weight.startswith("model.fc.weight  3×8    matmul     dim 1 of 3×")
    assert bias.startswith("model.fc.bias    3      reduction")
    assert "test_plan.py" in weight


def test_parameters_are_named_as_the_user_would_behind_a_getattr():
    """Adapters such as peft's forward what they lack, which Dynamo reads by way of __dict__."""

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(8, 3)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base, name)

        def forward(self, x):
            return self.base(x)

    plan = plan_of(nn.Sequential(Adapter()), torch.randn(4, 8))
    assert [row.parameter for row in plan.rows] == ["model.0.base.weight", "model.0.base.bias"]


def test_what_is_kept_has_its_price():
    fast_and_large = Cost(seconds=1.0e-3, kept=2e9)
    assert fast_and_large.price > Cost(seconds=1.5e-3, kept=1e8).price
    assert fast_and_large.price < Cost(seconds=2.5e-3, kept=1e8).price


def test_a_kernel_takes_as_long_as_what_it_needs_most():
    device = Device({torch.float32: 1e12, torch.bfloat16: 4e12}, bandwidth=1e9, launch=1e-6)
    product = device.multiply(2e12, torch.bfloat16, 1e6)
    assert product == Cost(seconds=0.5, flops=2e12, bytes=1e6)
    assert device.multiply(2e12, torch.float32, 3e9).seconds == 3.0
    # What is not listed is as fast as float32.
    assert device.multiply(2e12, torch.float16, 0.0).seconds == 2.0
    assert device.move(1e9, 1.0) == Cost(seconds=1 + 1e-6, bytes=1e9 + 1)


def test_costs_add_up():
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) == Cost(11, 22, 33, 44)


def test_a_gpu_that_is_not_there_is_an_h100():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    device = Device.of(torch.device("cuda"))
    # 989 TFLOP/s and 3.35 TB/s by its data sheet.
    assert device.matmul[torch.bfloat16] == pytest.approx(0.7 * 989e12, rel=0.01)
    assert device.bandwidth == pytest.approx(0.85 * 3.35e12, rel=0.01)
