"""A step that ran without the compiler leaves no gradient behind, wherever its parameters are."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import flashnorm_compile as fn

OPTIONS = {
    "max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4, "lowering": "eager",
}  # fmt: skip


def fill(model):
    """Stands for what code that runs by itself may put into ``.grad``."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def run_uncompiled(function, *args, **kwargs):
    step = fn.dp_step(function, **OPTIONS)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(fn.PrivacyError, match=r"without a private graph.*were discarded"),
    ):
        step(*args, **kwargs)
    return step


def assert_empty(*models):
    assert all(p.grad is None for model in models for p in model.parameters())


def test_modules_and_optimizers_among_the_arguments():
    models = [nn.Linear(6, 3) for _ in range(3)]
    optimizer = torch.optim.SGD(models[1].parameters())

    def function(model, optimizer, *, nested):
        for each in models:
            fill(each)

    run_uncompiled(function, models[0], optimizer, nested={"models": [models[2]]})
    assert_empty(*models)


def test_optimizer_alone():
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters())

    def function(optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)

    run_uncompiled(function, optimizer)
    assert_empty(model)


def test_parameters_as_arguments():
    weight = nn.Parameter(torch.randn(3, 6))

    def function(weights):
        weights["weight"].grad = torch.ones(3, 6)

    run_uncompiled(function, {"weight": weight})
    assert weight.grad is None


def test_model_in_a_closure():
    model = nn.Linear(6, 3)
    run_uncompiled(lambda: fill(model))
    assert_empty(model)


def test_model_of_a_trainer():
    class Trainer:
        def __init__(self):
            self.model = nn.Linear(6, 3)

        def step(self, x):
            fill(self.model)

    trainer = Trainer()
    run_uncompiled(trainer.step, torch.randn(4, 6))
    assert_empty(trainer.model)


def test_model_in_a_partial():
    model = nn.Linear(6, 3)

    def function(model, x):
        fill(model)

    run_uncompiled(functools.partial(function, model), torch.randn(4, 6))
    assert_empty(model)


def test_parameters_that_the_step_has_trained_before():
    class Holder:
        def __init__(self):
            self.model = nn.Linear(6, 3)

    @fn.dp_step(**OPTIONS)
    def step(holder, x):
        return holder.model(x).square().mean()

    holder = Holder()
    step(holder, torch.randn(4, 6)).backward()
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(fn.PrivacyError, match="without a private graph"),
    ):
        step(holder, torch.randn(4, 6))
    assert_empty(holder.model)


def test_model_among_the_globals(monkeypatch):
    model = nn.Linear(6, 3)
    monkeypatch.setitem(globals(), "MODEL", model)
    run_uncompiled(fill_the_global)
    assert_empty(model)


def fill_the_global():
    fill(MODEL)  # noqa: F821
