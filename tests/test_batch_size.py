"""Gradients that depend on how many samples there are: refused; B as the mean's 1/B: undone."""

from __future__ import annotations

import re

import pytest
import torch
from driver import Case, check_case, private_step
from torch import nn
from torch.nn import functional as F

import flashnorm_compile as fn

B, T, CLASSES = 6, 7, 5
DYNAMIC = (None, True, False)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, CLASSES)


def tokens(size: int):
    """Return features [B, T, 4], labels [B, T] and a mask [B, T] with a 1 in every row."""
    mask = (torch.rand(size, T) > 0.4).float()
    mask[:, 0] = 1.0
    return torch.randn(size, T, 4), torch.randint(CLASSES, (size, T)), mask


def token_losses(net, x, y):
    return F.cross_entropy(net(x).transpose(1, 2), y, reduction="none")


def by_size_of_the_batch(net, x, y, w):
    return (token_losses(net, x, y) * w).sum() / w.sum() * x.shape[0]


def by_count_per_sample(net, x, y, w):
    return (token_losses(net, x, y) * w).sum() / (w.sum() / x.shape[0])


def count_plus_size(net, x, y, w):
    return (token_losses(net, x, y) * w).sum() / (w.sum() + x.shape[0])


def count_of_at_least_size(net, x, y, w):
    return (token_losses(net, x, y) * w).sum() / torch.clamp(w.sum(), min=x.shape[0])


def half_the_sum(net, x, y, w):
    return token_losses(net, x, y).mean(1).sum() * 0.5


def sum_over_a_number(net, x, y, w):
    """The number is the batch's size, by accident."""
    return token_losses(net, x, y).mean(1).sum() / B


def logits_over_size(net, x, y, w):
    return F.cross_entropy((net(x) / x.shape[0]).flatten(0, 1), y.flatten())


def shifted_by_a_function_of_size(net, x, y, w):
    shift = torch.sin(torch.tensor(1000.0) * x.shape[0])
    return (net(x) + shift).square().mean()


def weights_by_position(net, x, y, w):
    return (token_losses(net, x, y).mean(1) * torch.arange(x.shape[0])).mean()


def weights_by_running_count(net, x, y, w):
    weights = torch.ones(x.shape[0]).cumsum(0)
    return (token_losses(net, x, y).mean(1) * weights).mean()


def first_rows_of_a_table(net, x, y, w):
    table = torch.arange(32.0)
    return (token_losses(net, x, y).mean(1) * table[: x.shape[0]]).mean()


def repeated_once_per_sample(net, x, y, w):
    size = x.shape[0]
    losses = token_losses(net, x, y).mean(1)
    return losses[:, None].expand(size, size).sum(1).mean()


REFUSED = {
    loss.__name__: loss
    for loss in (
        by_size_of_the_batch,
        by_count_per_sample,
        count_plus_size,
        count_of_at_least_size,
        half_the_sum,
        sum_over_a_number,
        logits_over_size,
        shifted_by_a_function_of_size,
        weights_by_position,
        weights_by_running_count,
        first_rows_of_a_table,
        repeated_once_per_sample,
    )
}


def refusal(loss, *, dynamic=None, loss_reduction="mean", batch=None) -> str:
    net = model()
    step = private_step(loss, loss_reduction=loss_reduction, dynamic=dynamic)
    with pytest.raises(fn.PrivacyError) as caught:
        step(net, *(tokens(B) if batch is None else batch))
    assert all(parameter.grad is None for parameter in net.parameters())
    return str(caught.value)


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, dynamic):
    text = refusal(REFUSED[name], dynamic=dynamic)
    assert "test_batch_size.py" in text, text
    assert "samples" in text, text
    assert re.search(r"Use |Declare |compute it within each sample", text), text


@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_mean_declared_a_sum(dynamic):
    def loss(net, x, y, w):
        return token_losses(net, x, y).mean(1).sum() / x.shape[0]

    text = refusal(loss, dynamic=dynamic, loss_reduction="sum")
    assert 'loss_reduction="sum"' in text


@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_time_as_long_as_the_batch_is_not_the_batch(dynamic):
    def loss(net, x, y):
        return token_losses(net, x, y).sum() / x.shape[1]

    x, y, _ = tokens(T)
    assert "loss_reduction" in refusal(loss, dynamic=dynamic, batch=(x, y))


ACCEPTED = {
    "sum_over_count_over_size": lambda net, x, y, w:
        (token_losses(net, x, y) * w).sum() / w.sum() / x.shape[0],
    "mean_over_count_per_sample": lambda net, x, y, w:
        (token_losses(net, x, y) * w).mean() / (w.sum() / x.shape[0]),
    "mean_over_share": lambda net, x, y, w:
        (token_losses(net, x, y) * w).mean() / (w.sum() / w.numel()),
    "mean_times_numel_over_count": lambda net, x, y, w:
        (token_losses(net, x, y) * w).mean() * w.numel() / w.sum(),
    "counted_by_ones": lambda net, x, y, w:
        token_losses(net, x, y).mean(1).sum() / torch.ones_like(y[:, 0]).sum(),
    "size_in_a_tensor": lambda net, x, y, w:
        token_losses(net, x, y).mean(1).sum() / torch.tensor(x.shape[0]),
    "token_mean_and_mean": lambda net, x, y, w:
        (token_losses(net, x, y) * w).sum() / w.sum() + token_losses(net, x, y).mean(),
    "linear_in_the_parameters": lambda net, x, y, w: net(x).mean(),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    check_case(Case(name, model, tokens, ACCEPTED[name], batch_size=B), "auto")


def test_step_for_one_batch_size_with_a_factor():
    """A table with a row per sample fixes B, so 6 may be the batch's size or not."""
    def loss(net, x, y, w):
        rows = torch.arange(1.0 * B * CLASSES).view(B, CLASSES)
        return (net(x[:, 0]) * rows).square().sum() / B

    text = refusal(loss)
    assert f"batches of {B} samples only" in text
    assert "Use .mean() without a factor" in text


def test_mean_where_time_is_as_long_as_the_batch():
    net = model()
    step = private_step(lambda net, x, y, w: token_losses(net, x, y).mean(), dynamic=True)
    step(net, *tokens(T))
    assert step.per_sample_norms.shape == (T,)


@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_norm_of_a_sample_does_not_depend_on_the_others(dynamic):
    net, batch = model(), tokens(B)
    step = private_step(lambda net, x, y, w: token_losses(net, x, y).mean(), dynamic=dynamic)
    norms = []
    for size in (B, 4, 2, 1):
        net.zero_grad()
        step(net, *(part[:size] for part in batch))
        norms.append(float(step.per_sample_norms[0]))
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-5)


def test_gradients_of_fused_attention_keep_the_factor_of_the_mean():
    """By its shapes: nothing but a GPU runs the operation."""

    def loss(net, x):
        heads = net(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(*heads, None, True)[0].square().mean()

    step = private_step(loss)
    with pytest.raises(NotImplementedError, match="_scaled_dot_product_efficient_attention"):
        step(nn.Linear(8, 24), torch.randn(B, T, 8))


@pytest.mark.parametrize("in_dims", [None, (None, 0, 0, 0)])
def test_the_size_of_an_argument_that_is_not_used_otherwise(in_dims):
    def step(net, x, y, ids):
        loss = F.cross_entropy(torch.sin(net(x) * ids.shape[0]), y)
        loss.backward()
        return loss.detach()

    private = fn.dp_step(step, max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=B,
                         lowering="eager", in_dims=in_dims)
    x, y = torch.randn(B, 4), torch.randint(CLASSES, (B,))
    with pytest.raises(fn.PrivacyError, match=r"depends on the (size of the batch|number of samp)"):
        private(model(), x, y, torch.arange(B))
    with pytest.raises(fn.PrivacyError, match=r"x has 6 samples, ids.* has 7"):
        private(model(), x, y, torch.arange(B + 1))
