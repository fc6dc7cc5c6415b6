"""Gradients that only a custom backward writes: sums that broadcast, and numbers added."""

from __future__ import annotations

import pytest
import torch
from driver import Case, check_every_strategy, model_oracle, private_step
from oracle import assert_matches_oracle
from torch import nn

import flashnorm_compile as fn


class _Linear(torch.autograd.Function):
    """x @ w, with a term added to the gradient of w."""

    @staticmethod
    def forward(ctx, x, w, kind):
        ctx.save_for_backward(x, w)
        ctx.kind = kind
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gradient = x.t() @ g
        if ctx.kind == "broadcast":
            gradient = x[:, :1].t() @ g + x.t() @ g[:, :1]
        elif ctx.kind == "number":
            gradient = gradient + 0.1
        elif ctx.kind == "number_and_sites":
            gradient = gradient + x.t() @ (2 * g) + 0.1
        return g @ w.t(), gradient, None


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.w = kind, nn.Parameter(torch.randn(6, 6) / 2)

    def forward(self, x):
        return _Linear.apply(x, self.w, self.kind)


def test_sites_that_broadcast_in_their_sum():
    check_every_strategy(Case(
        "broadcast", lambda: Model("broadcast"), lambda size: (torch.randn(size, 6),),
        lambda model, x: model(x).square().mean(),
    ))


@pytest.mark.parametrize("strategy", ["ghost", "materialize"])
@pytest.mark.parametrize("kind", ["number", "number_and_sites"])
def test_a_number_is_part_of_every_samples_gradient(kind, strategy):
    """Whatever the size of the batch."""
    model = Model(kind)
    step = private_step(lambda model, x: model(x).square().mean(), strategy=strategy,
                        max_grad_norm=0.5)
    for size in (2, 5):
        x = torch.randn(size, 6)
        model.zero_grad()
        step(model, x)
        oracle = model_oracle(model, lambda model, x: model(x).square().mean(), (x,))
        expected = oracle.clip(max_grad_norm=0.5, expected_batch_size=9, loss_reduction="mean")
        assert_matches_oracle(
            expected, norms=step.per_sample_norms, factors=step.clipping_factors,
            grads={"w": model.w.grad},
        )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, w):
        ctx.save_for_backward(tokens, w)
        return w[tokens]

    @staticmethod
    def backward(ctx, g):
        tokens, w = ctx.saved_tensors
        return None, torch.zeros_like(w).index_put((tokens,), g[..., :1], accumulate=True)


@pytest.mark.parametrize("strategy", ["ghost", "materialize", "auto"])
def test_rows_that_broadcast_into_a_table(strategy):
    def loss(model, tokens, x):
        return (_Embedding.apply(tokens, model.w) * x).sum() + (model.w[tokens] * x).sum()

    model, x = Model(""), torch.zeros(3, 1, 6)
    x[0] = 1.0
    step = private_step(loss, strategy=strategy, loss_reduction="sum")
    try:
        step(model, torch.zeros(3, 1, dtype=torch.long), x)
    except fn.PrivacyError:
        return
    assert model.w.grad.norm() <= 1.0 + 1e-5
