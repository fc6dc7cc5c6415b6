"""Losses that look as if samples mixed, and do not: accepted, and equal to the oracle."""

from __future__ import annotations

import pytest
import torch
from driver import Case, check_case
from torch import nn
from torch.nn import functional as F
from zoo_dense import mlp

B = 4
CASES = {}


def lookalike(*features, model=mlp, targets=None, inputs=None):
    """Register a loss; its batch is x [B, *features] and, with ``targets``, y [B, *targets]."""

    def default_inputs(size):
        x = torch.randn(size, *(features or (6,)))
        return (x,) if targets is None else (x, torch.randn(size, *targets))

    def register(loss):
        name = loss.__name__
        CASES[name] = Case(name, model, inputs or default_inputs, loss, batch_size=B)
        return loss

    return register


def ids_and_x(size):
    return torch.randn(size, 5, 6), torch.randint(5, (size,))


@lookalike(5, 6)
def running_total_over_time(model, x):
    return model(x).cumsum(1).square().mean()


@lookalike(5, 6)
def sorted_within_each_sample(model, x):
    ordered = model(x).sort(1).values
    return (ordered * torch.arange(5.0)[:, None]).square().mean()


@lookalike(5, 6)
def topk_within_each_sample(model, x):
    return model(x).topk(2, dim=1).values.square().mean()


@lookalike(5, 6)
def mean_and_max_over_time(model, x):
    hidden = model(x)
    return (hidden.mean(1) + hidden.amax(1) - hidden.min(1).values).square().mean()


@lookalike(5, 6)
def softmax_over_time(model, x):
    hidden = model(x)
    return (hidden.softmax(1) * hidden).sum(1).square().mean()


@lookalike(5, 6)
def logsumexp_over_time(model, x):
    return model(x).logsumexp(1).square().mean()


@lookalike(5, 6)
def rolled_over_time(model, x):
    hidden = model(x)
    return (hidden * hidden.roll(1, 1)).mean() + hidden.roll(2, -1).square().mean()


@lookalike(5, 6)
def flipped_over_time(model, x):
    hidden = model(x)
    return (hidden * hidden.flip(1)).mean()


@lookalike(5, 6)
def neighbours_in_time(model, x):
    hidden = model(x)
    return (hidden[:, 1:] - hidden[:, :-1]).square().mean()


@lookalike(5, 6)
def differences_in_time(model, x):
    return model(x).diff(dim=1).abs().mean()


@lookalike(5, 6)
def standardised_within_each_sample(model, x):
    hidden = model(x)
    hidden = (hidden - hidden.mean((1, 2), keepdim=True)) / (hidden.std((1, 2), keepdim=True) + 1)
    return (hidden * torch.arange(3.0)).square().mean()


@lookalike(5, 6)
def scaled_by_each_samples_largest(model, x):
    hidden = model(x)
    return (hidden / hidden.abs().amax((1, 2), keepdim=True)).square().mean()


@lookalike(5, 6)
def normalised_by_each_samples_norm(model, x):
    return F.normalize(model(x).flatten(1), dim=1).sum(-1).square().mean()


@lookalike(5, 6)
def root_of_each_samples_mean(model, x):
    """RMSE per sample, then the mean."""
    return (model(x).square().mean((1, 2)) + 1e-4).sqrt().mean()


@lookalike(5, 6)
def variance_within_each_sample(model, x):
    return model(x).var(1).mean()


@lookalike(5, 6)
def gram_matrix_of_each_sample(model, x):
    """Style loss: features by features, per sample."""
    hidden = model(x)
    return (hidden.transpose(1, 2) @ hidden / 5).square().mean()


@lookalike(5, 6)
def contrastive_within_each_sample(model, x):
    hidden = F.normalize(model(x), dim=-1)
    logits = hidden @ hidden.transpose(1, 2)
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(5).repeat(x.shape[0]))


@lookalike(5, 6)
def distances_within_each_sample(model, x):
    hidden = model(x)
    return (hidden[:, :, None] - hidden[:, None]).square().sum(-1).mean()


@lookalike(inputs=ids_and_x)
def last_token_by_arange(model, x, last):
    """``h[arange(B), idx]``: an identity gather along the batch."""
    hidden = model(x)
    return hidden[torch.arange(x.shape[0]), last].square().mean()


@lookalike(inputs=ids_and_x)
def last_token_by_gather(model, x, last):
    picked = model(x).gather(1, last[:, None, None].expand(-1, 1, 3))
    return picked.square().mean()


@lookalike(inputs=ids_and_x)
def last_token_by_take_along_dim(model, x, last):
    return model(x).take_along_dim(last[:, None, None], 1).square().mean()


@lookalike(inputs=ids_and_x)
def last_token_by_mask(model, x, last):
    mask = F.one_hot(last, 5).bool()[..., None]
    return torch.where(mask, model(x), 0.0).sum(1).square().mean()


@lookalike(inputs=ids_and_x)
def masked_pooling(model, x, last):
    mask = (torch.arange(5) <= last[:, None]).float()[..., None]
    return ((model(x) * mask).sum(1) / mask.sum(1)).square().mean()


@lookalike(inputs=ids_and_x)
def masked_fill_per_sample(model, x, last):
    hidden = model(x).masked_fill((torch.arange(5) > last[:, None])[..., None], -1e4)
    return hidden.logsumexp(1).square().mean()


@lookalike(inputs=ids_and_x)
def scattered_within_each_sample(model, x, last):
    hidden = model(x)
    sums = torch.zeros_like(hidden).scatter_add(1, last[:, None, None].expand_as(hidden), hidden)
    return sums.square().mean()


@lookalike(inputs=ids_and_x)
def condition_per_sample(model, x, last):
    hidden = model(x)
    return torch.where((last > 2)[:, None, None], hidden.square(), hidden.abs()).mean()


@lookalike(5, 6)
def condition_on_the_activations(model, x):
    hidden = model(x)
    return torch.where(hidden > hidden.mean(1, keepdim=True), hidden, 0.1 * hidden).square().mean()


@lookalike(5, 6)
def reshape_there_and_back(model, x):
    hidden = model(x.reshape(-1, 6)).reshape(x.shape[0], 5, 3)
    return hidden.reshape(x.shape[0], -1).cumsum(1).square().mean()


@lookalike(5, 6)
def time_first_and_back(model, x):
    hidden = model(x.transpose(0, 1)).transpose(0, 1)
    return hidden.cumsum(1).square().mean()


@lookalike(5, 6)
def time_first_flattened(model, x):
    """[T·B, d]: the batch is the inner part of a merged dim."""
    flat = model(x.transpose(0, 1).reshape(-1, 6))
    return flat.view(5, x.shape[0], 3).mean(0).square().mean()


@lookalike(4, 4, 6)
def grid_as_large_as_the_batch(model, x):
    """Three dims of the batch's size, permuted and merged."""
    hidden = model(x.permute(1, 0, 2, 3).reshape(4, -1, 6))
    return hidden.view(4, x.shape[0], 4, 3).permute(2, 1, 0, 3).cumsum(0).square().mean()


@lookalike(4, 6)
def transposed_time_as_long_as_the_batch(model, x):
    hidden = model(x)
    return (hidden.transpose(1, 2) @ torch.ones(4, 4).tril()).square().mean()


@lookalike(4, 6)
def constant_matrix_over_time_as_long_as_the_batch(model, x):
    """``M @ x`` with M [B, B]: over T, which is as long."""
    mix = torch.arange(16.0).view(4, 4) / 16
    return (mix @ model(x)).square().mean()


@lookalike(6)
def constant_with_one_row_per_sample(model, x):
    """A constant table whose row i meets sample i only."""
    rows = torch.arange(12.0).view(4, 3) / 12
    return (model(x) * (1 + 0 * rows)).square().mean()


@lookalike(5, 6)
def causal_mask(model, x):
    hidden = model(x)
    scores = hidden @ hidden.transpose(1, 2)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    return (scores.masked_fill(mask, float("-inf")).softmax(-1) @ hidden).square().mean()


@lookalike(5, 6)
def constant_mask(model, x):
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])[None, :, None]
    return (model(x) * mask).square().sum() / (mask.sum() * 3 * x.shape[0])


@lookalike(5, 6)
def permuted_time_by_a_constant(model, x):
    order = torch.tensor([3, 1, 4, 0, 2])
    hidden = model(x)
    return (hidden[:, order] * hidden).mean() + hidden.index_select(1, order[:2]).square().mean()


@lookalike(8, 6)
def pooled_over_time(model, x):
    hidden = model(x).transpose(1, 2)
    pooled = F.avg_pool1d(hidden, 2) + F.max_pool1d(hidden, 2)
    return F.adaptive_avg_pool1d(pooled, 2).square().mean()


@lookalike(5, 6)
def einsum_within_each_sample(model, x):
    hidden = model(x)
    return torch.einsum("btd,bsd,be->tse", hidden, hidden, x.mean(1)).sum() / x.shape[0]


@lookalike(5, 6)
def heads_repeated(model, x):
    hidden = model(x)[:, None].repeat(1, 2, 1, 1)
    twice = hidden.repeat_interleave(2, dim=1)
    return (twice * torch.arange(4.0)[:, None, None]).square().mean()


@lookalike(5, 6)
def unfolded_time(model, x):
    return model(x).unfold(1, 3, 1).mean(-1).square().mean()


@lookalike(5, 6)
def padded_time(model, x):
    return F.pad(model(x), (0, 0, 2, 1), value=0.5).cumsum(1).square().mean()


@lookalike(5, 6)
def split_stacked_and_joined(model, x):
    first, second = model(x).split([2, 3], dim=1)
    joined = torch.cat([second, first], 1)
    return torch.stack([joined, 2 * joined]).diff(dim=0).mean(2).square().mean()


@lookalike(5, 6)
def loop_over_time(model, x):
    total = torch.zeros(x.shape[0], 3)
    for step in x.unbind(1):
        total = (total + model(step)).tanh()
    return total.square().mean()


@lookalike(5, 6)
def vmapped_over_samples(model, x):
    return torch.vmap(lambda one: model(one).cumsum(0).square().mean())(x).mean()


@lookalike(6, targets=(3,))
def statistics_that_reach_no_gradient(model, x, y):
    """A batch mean that is computed and thrown away, or detached from the loss's gradient."""
    hidden = model(x)
    hidden.mean(0).square().sum()
    return F.mse_loss(hidden, y)


@lookalike(3, 8, model=lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()))
def group_norm(model, x):
    return model(x).cumsum(-1).square().mean()


@lookalike(3, 8, model=lambda: nn.Sequential(nn.Conv1d(3, 4, 3),
                                             nn.InstanceNorm1d(4, affine=True), nn.Tanh()))
def instance_norm(model, x):
    return model(x).cumsum(-1).square().mean()


@lookalike(5, 6, model=lambda: nn.Sequential(nn.Linear(6, 3), nn.LayerNorm((5, 3))))
def layer_norm_over_time_and_features(model, x):
    return model(x).cumsum(1).square().mean()


@pytest.mark.parametrize("name", CASES)
def test_accepted(name):
    check_case(CASES[name], "auto")
