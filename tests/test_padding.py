"""Gradients of vocabulary-sized logits, padded for the matrix units of a GPU."""

from __future__ import annotations

import pytest
import torch
from driver import (
    STRATEGIES,
    bound_that_clips_some,
    call,
    check_case,
    clip,
    model_oracle,
    private_step,
    read_result,
)
from oracle import assert_matches_oracle
from torch import nn
from zoo_inputs import token_cross_entropy, tokens
from zoo_modules import all_cases

from flashnorm_compile.passes.sites import matmul

CASES = all_cases()
PADDED = (
    "sharing-tied_head",
    "sharing-tied_head_padding_idx",
    "sharing-tied_head_of_prompt",
    "dense-mlp_time_axis",
    "dense-time_first",
    "calls-autocast_tied_head",
    "calls-bfloat16_tied_head",
)


@pytest.fixture(autouse=True)
def pad_everything(monkeypatch):
    """As on a GPU, for small sizes."""
    padded = []

    def wants_padding(left):
        wanted = left.ndim == 2 and isinstance(left.shape[0], int) and left.shape[0] % 8 != 0
        padded.append(wanted)
        return wanted

    monkeypatch.setattr(matmul, "wants_padding", wants_padding)
    yield
    assert any(padded)


@pytest.mark.parametrize("strategy", ["materialize", "ghost"])
@pytest.mark.parametrize("name", PADDED)
def test_matches_oracle(name, strategy):
    check_case(CASES[name], strategy)


@pytest.mark.inductor
@pytest.mark.parametrize("strategy", ["materialize", "ghost"])
def test_matches_oracle_with_inductor(strategy):
    check_case(CASES["sharing-tied_head"], strategy, lowering="inductor")


class Head(nn.Module):
    """Logits whose gradient alone is not finite: the token's loss is scaled by its own input."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, ids, scale):
        return self.head(self.words(ids).tanh()) * scale[:, :, None]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_samples_without_a_finite_gradient_are_left_out(strategy):
    def loss(model, ids, scale, labels):
        return token_cross_entropy(lambda x: model(x, scale), ids, labels)

    model, step = Head(), private_step(loss, strategy=strategy)
    for bad in (float("nan"), float("inf")):
        ids, labels = tokens(5, 11)(4)
        scale = torch.ones(4, 5)
        scale[1, 3] = bad
        batch = (ids, scale, labels)
        per_sample = model_oracle(model, loss, batch)
        step.max_grad_norm = bound_that_clips_some(per_sample.norms)
        expected = clip(per_sample, step.max_grad_norm, "mean")
        assert (expected.factors[[0, 2, 3]] < 1).any()
        model.zero_grad()
        actual = read_result(step, model, call(step, model, batch))
        assert actual.nonfinite_samples == 1
        assert_matches_oracle(
            expected, norms=actual.norms, factors=actual.factors, grads=actual.grads
        )
