"""Norms, sums and factors are float32 whatever the model computes in."""

from __future__ import annotations

import pytest
import torch
from driver import STRATEGIES
from torch import nn

import flashnorm_compile as fn

OPTIONS = {"noise_multiplier": 0.0, "loss_reduction": "sum", "lowering": "eager"}


def integers(size: int, features: int) -> torch.Tensor:
    """Small integers: exact in bfloat16, and so are their products."""
    return torch.randint(1, 4, (size, features)).float()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
def test_norm_is_not_rounded_to_bfloat16(autocast, strategy):
    """The gradient of sample i is x_i exactly, so its norm is known to float32."""
    model = nn.Linear(401, 1, bias=False)
    model = model if autocast else model.bfloat16()
    x = integers(6, 401)

    @fn.dp_step(max_grad_norm=1e4, strategy=strategy, **OPTIONS)
    def step(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(x).sum()
        loss.backward()
        return loss.detach()

    step(model, x if autocast else x.bfloat16())
    assert step.per_sample_norms.dtype == torch.float32
    torch.testing.assert_close(step.per_sample_norms, x.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_norm_over_time_is_not_rounded_to_bfloat16(strategy):
    model = nn.Linear(33, 3, bias=False).bfloat16()
    x = integers(4, 7 * 33).view(4, 7, 33)

    @fn.dp_step(max_grad_norm=1e5, strategy=strategy, **OPTIONS)
    def step(model, x):
        loss = model(x).sum()
        loss.backward()
        return loss.detach()

    step(model, x.bfloat16())
    expected = x.sum(1).norm(dim=1) * 3**0.5
    torch.testing.assert_close(step.per_sample_norms, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clipped_sum_is_not_accumulated_in_bfloat16(strategy):
    """257 equal samples under autocast: a bfloat16 sum would stop at 256."""
    model = nn.Linear(3, 2, bias=False)
    x = torch.ones(257, 3)

    @fn.dp_step(max_grad_norm=6**0.5 / 2, strategy=strategy, **OPTIONS)
    def step(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).sum()
        loss.backward()
        return loss.detach()

    step(model, x)
    assert model.weight.grad.dtype == torch.float32
    torch.testing.assert_close(model.weight.grad, torch.full((2, 3), 128.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clipping_factor_is_not_rounded_to_bfloat16(strategy):
    """Under autocast the weighted gradient takes c in float32: the result is C to 1e-5."""
    model = nn.Linear(401, 1, bias=False)
    x = integers(1, 401)

    @fn.dp_step(max_grad_norm=1.0, strategy=strategy, **OPTIONS)
    def step(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).sum()
        loss.backward()
        return loss.detach()

    step(model, x)
    torch.testing.assert_close(model.weight.grad[0], x[0] / x[0].norm(), rtol=1e-5, atol=0)


def test_gradient_has_the_dtype_of_its_parameter():
    model = nn.Sequential(nn.Linear(6, 4).bfloat16(), nn.Linear(4, 3).bfloat16())

    @fn.dp_step(max_grad_norm=1.0, **OPTIONS)
    def step(model, x):
        loss = model(x).float().square().sum()
        loss.backward()
        return loss.detach()

    step(model, torch.randn(4, 6).bfloat16())
    assert {param.grad.dtype for param in model.parameters()} == {torch.bfloat16}
    assert step.clipping_factors.dtype == torch.float32


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_cancellation_in_a_nearly_zero_gradient(strategy):
    """Tokens whose gradients cancel: a Gram product must not give a negative square."""
    model = nn.Linear(16, 8, bias=False)
    x = torch.randn(3, 1, 16).repeat(1, 6, 1)
    sign = torch.tensor([1.0, -1.0] * 3)[None, :, None]

    @fn.dp_step(max_grad_norm=1.0, strategy=strategy, **OPTIONS)
    def step(model, x, sign):
        loss = (model(x) * sign).sum()
        loss.backward()
        return loss.detach()

    step(model, x, sign.expand(3, -1, -1).clone())
    assert torch.isfinite(step.per_sample_norms).all()
    assert (step.per_sample_norms < 1e-2).all()
    assert step.nonfinite_samples == 0
