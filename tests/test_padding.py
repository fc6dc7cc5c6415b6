"""Gradients of vocabulary-sized logits, padded for the matrix units of a GPU."""

from __future__ import annotations

import pytest
import torch
from driver import STRATEGIES, Case, call, check_case, private_step
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


@pytest.mark.parametrize("strategy", STRATEGIES)
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_samples_without_a_finite_gradient_are_left_out(strategy, bad):
    def inputs(size):
        ids, labels = tokens(5, 11)(size)
        scale = torch.ones(size, 5)
        scale[1, 3] = bad
        return ids, scale, labels

    def loss(model, ids, scale, labels):
        return token_cross_entropy(lambda x: model(x, scale), ids, labels)

    case = Case("head", Head, inputs, loss)
    check_case(case, strategy)
    step = private_step(loss, strategy=strategy)
    call(step, case.build_model(), case.build_batch())
    assert step.nonfinite_samples == 1
