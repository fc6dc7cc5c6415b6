"""Microbatches of one logical batch: clipped sums add up, noise comes once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flashnorm_compile as fn


def make(noise_multiplier=0.0, **options):
    model = nn.Linear(6, 3)

    @fn.dp_step(
        max_grad_norm=0.5,
        noise_multiplier=noise_multiplier,
        expected_batch_size=8,
        lowering="eager",
        **options,
    )
    def step(model, x, y):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss.detach()

    return model, step


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_microbatches_of_different_sizes_equal_one_batch():
    model, step = make()
    x, y = torch.randn(9, 6), torch.randn(9, 3)
    step(model, x, y)
    whole, norms = gradients(model), step.per_sample_norms
    model.zero_grad()
    with step.accumulate():
        for part in (slice(0, 4), slice(4, 6), slice(6, 9)):
            step(model, x[part], y[part])
    torch.testing.assert_close(gradients(model), whole, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(step.per_sample_norms, norms)
    assert step.clipping_factors.shape == (9,)


def test_gradient_stays_empty_until_the_noise_is_in():
    model, step = make(noise_multiplier=1.0)
    with step.accumulate():
        step(model, torch.randn(4, 6), torch.randn(4, 3))
        assert model.weight.grad is None
    assert model.weight.grad is not None


def test_noise_comes_exactly_once():
    # Without data in the way: empty microbatches leave noise alone, of one release's variance.
    model, step = make(noise_multiplier=2.0, seed=5)
    samples = []
    for _ in range(60):
        model.zero_grad()
        with step.accumulate():
            for _ in range(3):
                step(model, torch.zeros(0, 6), torch.zeros(0, 3))
        samples.append(torch.cat([g.flatten() for g in gradients(model)]))
    standard_deviation = torch.stack(samples).std()
    expected = 2.0 * 0.5 / 8
    # 1260 draws: the standard error of the estimate is 2 %.
    assert abs(standard_deviation / expected - 1) < 0.08


def test_accountant_sees_one_release():
    recorded = []

    class Accountant:
        def record(self, **release):
            recorded.append(release)

    model, step = make(noise_multiplier=1.5, accountant=Accountant(), sampling_rate=0.1)
    with step.accumulate():
        for _ in range(3):
            step(model, torch.randn(2, 6), torch.randn(2, 3))
    assert recorded == [{"noise_multiplier": 1.5, "sampling_rate": 0.1}]


def test_failure_inside_discards_the_sum():
    model, step = make()
    with pytest.raises(KeyError), step.accumulate():
        step(model, torch.randn(4, 6), torch.randn(4, 3))
        raise KeyError
    assert model.weight.grad is None
    with step.accumulate():
        step(model, torch.zeros(2, 6), torch.zeros(2, 3) + model.bias.detach())
    assert model.weight.grad.abs().max() == 0, "a sum survived the failure"


def test_optimizer_step_inside_is_refused():
    model, step = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    with (
        pytest.raises(fn.PrivacyError, match=r"optimizer\.step\(\) ran inside accumulate\(\)"),
        step.accumulate(),
    ):
        step(model, torch.randn(4, 6), torch.randn(4, 3))
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=0)


def test_gradient_left_over_is_refused():
    model, step = make()
    step(model, torch.randn(4, 6), torch.randn(4, 3))
    with (
        pytest.raises(fn.PrivacyError, match=r"\.grad is not empty inside accumulate\(\)"),
        step.accumulate(),
    ):
        step(model, torch.randn(4, 6), torch.randn(4, 3))


def test_settings_are_fixed_inside():
    _, step = make()
    with (
        pytest.raises(fn.PrivacyError, match=r"max_grad_norm cannot change inside"),
        step.accumulate(),
    ):
        step.max_grad_norm = 2.0


def test_nothing_to_release_is_an_error():
    _, step = make()
    with pytest.raises(fn.PrivacyError, match="without a single microbatch"), step.accumulate():
        pass


def test_backward_may_be_the_callers():
    model = nn.Linear(6, 3)
    step = fn.dp_step(
        lambda model, x, y: F.mse_loss(model(x), y),
        max_grad_norm=0.5,
        noise_multiplier=0.0,
        expected_batch_size=8,
        lowering="eager",
    )
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    step(model, x, y).backward()
    whole = gradients(model)
    model.zero_grad()
    with step.accumulate():
        step(model, x[:3], y[:3]).backward()
        step(model, x[3:], y[3:]).backward()
    torch.testing.assert_close(gradients(model), whole, rtol=1e-5, atol=1e-7)
