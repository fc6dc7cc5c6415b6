"""Merged batch axes: products of rows in the same order, and of constants with a row each."""

from __future__ import annotations

import pytest
import torch
from driver import STRATEGIES, make_step
from torch import nn

import flashnorm_compile as fn


class Table(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


def by_time(x):
    return x.transpose(0, 1).flatten(0, 1)


def same_order(model, x, z):
    return (model.weight * (by_time(x).T @ by_time(z))).sum()


def constant_rows(model, x, z):
    rows = torch.linspace(-1, 2, 5 * z.shape[0] * 8).view(5, z.shape[0] * 8)
    return (model.weight * (rows @ by_time(z))).sum()


def row_per_sample_of_a_vector(model, x, z):
    """Two samples read each entry."""
    return (model.weight[torch.arange(4) % 2, 0] * z[:, 0, 0].square()).sum()


def row_per_sample_of_a_matrix(model, x, z):
    return (model.weight.unsqueeze(2)[torch.arange(4) % 3] * z[:, :2, :1]).sum()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "loss", [same_order, constant_rows, row_per_sample_of_a_vector, row_per_sample_of_a_matrix]
)
def test_rows_of_a_sample_find_each_other(loss, strategy):
    torch.manual_seed(0)
    model, batch = Table(5, 2), (torch.randn(4, 8, 5), torch.randn(4, 8, 2))
    step = fn.dp_step(max_grad_norm=1e6, noise_multiplier=0.0, loss_reduction="sum",
                      lowering="eager", strategy=strategy)(make_step(loss))
    step(model, *batch)
    plain = torch.autograd.grad(loss(model, *batch), model.weight)[0]
    torch.testing.assert_close(model.weight.grad, plain)
