"""Randomness in the forward: norms and gradients come from the masks that the loss saw.

A sample alone draws other random numbers than the sample in its batch, so the oracle cannot replay
dropout. It can replay a mask: the step returns what came out of dropout, the mask is read off it,
and the oracle gets the mask as an input.
"""

from __future__ import annotations

import pytest
import torch
from driver import (
    EXPECTED_BATCH_SIZE,
    STRATEGIES,
    Case,
    check_case,
    clip,
    model_oracle,
    read_result,
)
from oracle import assert_matches_oracle
from torch import nn
from torch.nn import functional as F

import flashnorm_compile as fn

LOWERINGS = ["eager", pytest.param("inductor", marks=pytest.mark.inductor)]


class Net(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.first, self.second, self.p = nn.Linear(6, 32), nn.Linear(32, 3), p

    def forward(self, x, mask=None):
        hidden = self.first(x).tanh()
        dropped = F.dropout(hidden, self.p) if mask is None else hidden * mask
        return self.second(dropped), dropped


def loss_of(model, x, y, mask=None):
    return F.cross_entropy(model(x, mask)[0], y)


def dropout_step(strategy, lowering, bound):
    @fn.dp_step(max_grad_norm=bound, noise_multiplier=0.0, strategy=strategy, lowering=lowering,
                expected_batch_size=EXPECTED_BATCH_SIZE)
    def step(model, x, y):
        logits, dropped = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        return loss.detach(), dropped.detach()

    return step


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_of_the_batch(strategy, lowering):
    model = Net(0.4)
    x, y = torch.randn(5, 6), torch.randint(3, (5,))
    step = dropout_step(strategy, lowering, 0.8)
    kept = []
    for _ in range(2):
        model.zero_grad()
        loss, dropped = step(model, x, y)
        hidden = model.first(x).tanh().detach()
        mask = torch.where(dropped == 0, 0.0, 1 / 0.6)
        torch.testing.assert_close(dropped, hidden * mask)
        expected = clip(model_oracle(model, loss_of, (x, y, mask)), 0.8, "mean")
        result = read_result(step, model, loss)
        assert_matches_oracle(expected, norms=result.norms, factors=result.factors,
                              grads=result.grads)
        torch.testing.assert_close(loss, loss_of(model, x, y, mask).detach())
        kept.append(mask > 0)
    share = torch.stack(kept).float().mean()
    # 320 draws with probability 0.6: standard deviation 0.027.
    assert 0.45 < share < 0.75
    assert not torch.equal(kept[0], kept[1]), "the same mask in two steps"
    assert not torch.equal(kept[0][0], kept[0][1]), "the same mask for two samples"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_are_counted_exactly(strategy):
    """With inputs of one the gradient counts the kept units: norm² and gradient must agree."""
    weight = nn.Parameter(torch.ones(64))

    @fn.dp_step(max_grad_norm=1e6, noise_multiplier=0.0, loss_reduction="sum", strategy=strategy,
                lowering="eager")
    def step(weight, x):
        loss = (F.dropout(x, 0.5) * weight).sum()
        loss.backward()
        return loss.detach()

    loss = step(weight, torch.ones(5, 64))
    kept = step.per_sample_norms.square() / 4
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    torch.testing.assert_close(kept.sum() * 2, weight.grad.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, weight.grad.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropout_of_zero(strategy):
    check_case(
        Case("dropout_zero", lambda: Net(0.0),
             lambda size: (torch.randn(size, 6), torch.randint(3, (size,))), loss_of),
        strategy,
    )


def test_noise_in_the_activations():
    """A fresh random tensor is a constant: it depends on no sample."""
    linear = nn.Linear(6, 3)

    @fn.dp_step(max_grad_norm=0.5, noise_multiplier=0.0, expected_batch_size=EXPECTED_BATCH_SIZE,
                lowering="eager")
    def step(model, x):
        noise = torch.randn_like(x)
        loss = model(x + noise).square().mean()
        loss.backward()
        return loss.detach(), noise

    x = torch.randn(4, 6)
    loss, noise = step(linear, x)
    expected = clip(
        model_oracle(linear, lambda m, x, n: m(x + n).square().mean(), (x, noise)), 0.5, "mean"
    )
    result = read_result(step, linear, loss)
    assert_matches_oracle(expected, norms=result.norms, factors=result.factors, grads=result.grads)


def test_attention_dropout_keeps_the_bound():
    """Where no mask can be read off: each sample's share is still at most C."""
    model = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    @fn.dp_step(max_grad_norm=1e-3, noise_multiplier=0.0, expected_batch_size=1, lowering="eager")
    def step(model, x):
        loss = 10 * model(x, x, x, need_weights=False)[0].square().mean()
        loss.backward()
        return loss.detach()

    step(model, torch.randn(4, 5, 8))
    total = torch.cat([param.grad.flatten() for param in model.parameters()]).norm()
    assert 0 < total <= 4e-3 * 1.0001
    bounded = step.per_sample_norms * step.clipping_factors
    assert (bounded <= 1e-3 * 1.0001).all()


def test_same_seed_same_masks():
    """Seeding torch before the step repeats its masks."""
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    grads = []
    for _ in range(2):
        torch.manual_seed(5)
        model = Net(0.5)
        step = dropout_step("auto", "eager", 0.5)
        torch.manual_seed(6)
        step(model, x, y)
        grads.append([param.grad for param in model.parameters()])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
