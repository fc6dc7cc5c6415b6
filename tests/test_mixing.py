"""Losses in which samples mix: each is refused, by name, at its line, with a remedy."""

from __future__ import annotations

import re

import pytest
import torch
from driver import STRATEGIES, make_step
from torch import nn
from torch.nn import functional as F
from zoo_dense import mlp
from zoo_sharing import TiedHead

import flashnorm_compile as fn

#: A message must tell the user what to do.
REMEDY = re.compile(
    r"\b(use|replace|remove|compute|instead|move|pass|drop|keep|take|detach|normali[sz]e|write)\b",
    re.IGNORECASE,
)


def labels(size=4, classes=3):
    return torch.randint(classes, (size,))


def xy(*features, size=4, classes=3):
    return torch.randn(size, *features), labels(size, classes)


MIXING = {}


def mixing(*words, model=mlp, batch=lambda: xy(6)):
    """Register a loss that mixes samples; the error must contain one of ``words``."""

    def register(loss):
        MIXING[loss.__name__] = (loss, model, batch, words)
        return loss

    return register


class WithNorm(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8, **options)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@mixing("batch_norm", "batch norm", "BatchNorm", "mean", "var", model=WithNorm)
def batch_norm(model, x, y):
    return F.cross_entropy(model(x), y)


@mixing("batch_norm", "batch norm", "BatchNorm", "mean", "var",
        model=lambda: WithNorm(track_running_stats=False))
def batch_norm_without_running_statistics(model, x, y):
    return F.cross_entropy(model(x), y)


@mixing("batch_norm", "batch norm", "BatchNorm", "mean", "var",
        model=lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
                                    nn.Linear(36, 3)),
        batch=lambda: xy(3, 5, 5))
def batch_norm_of_images(model, x, y):
    return F.cross_entropy(model(x), y)


@mixing("mm")
def contrastive_logits(model, x, y):
    hidden = F.normalize(model(x), dim=-1)
    return F.cross_entropy(hidden @ hidden.T, torch.arange(x.shape[0]))


@mixing("mm", batch=lambda: (torch.randn(4, 6), torch.randn(4, 6)))
def two_tower_contrastive(model, left, right):
    logits = model(left) @ model(right).t()
    target = torch.arange(left.shape[0])
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


@mixing("index", "flip", "gather")
def mixup_in_the_batch(model, x, y):
    mixed = 0.7 * x + 0.3 * x.flip(0)
    return F.cross_entropy(model(mixed), y)


@mixing("index")
def mixup_with_a_random_permutation(model, x, y):
    order = torch.randperm(x.shape[0])
    return 0.7 * F.cross_entropy(model(0.7 * x + 0.3 * x[order]), y)


@mixing("mean", "mul", "sum")
def load_balancing(model, x, y):
    gates = model(x).softmax(-1)
    return F.nll_loss(gates.log(), y) + 0.1 * (gates.mean(0) * gates.mean(0)).sum()


@mixing("mean", "mul", "sum")
def load_balancing_by_counts(model, x, y):
    """The share of samples per expert times its mean gate (Switch Transformer)."""
    gates = model(x).softmax(-1)
    share = F.one_hot(gates.argmax(-1), 3).float().mean(0)
    return F.nll_loss(gates.log(), y) + 0.1 * (share * gates.mean(0)).sum()


@mixing("softmax", "amax", "max", "sum")
def softmax_over_the_batch(model, x, y):
    weights = model(x).softmax(0)
    return (weights * x[:, :3]).sum(-1).mean()


@mixing("mean", "std", "var")
def standardised_by_the_batch(model, x, y):
    hidden = model(x)
    hidden = (hidden - hidden.mean(0)) / (hidden.std(0) + 1e-5)
    return F.cross_entropy(hidden, y)


@mixing("mean")
def input_centred_by_the_batch(model, x, y):
    return F.cross_entropy(model(x - x.mean(0)), y)


@mixing("sort")
def sorted_over_the_batch(model, x, y):
    ordered = model(x).sort(0).values
    return F.cross_entropy(ordered, y)


@mixing("roll")
def rolled_over_the_batch(model, x, y):
    return F.cross_entropy(model(x + x.roll(1, 0)), y)


@mixing("cumsum")
def running_total_over_the_batch(model, x, y):
    return F.cross_entropy(model(x).cumsum(0), y)


@mixing("attention", "bmm", "mm", "softmax", model=lambda: nn.MultiheadAttention(6, 2),
        batch=lambda: (torch.randn(4, 5, 6),))
def attention_over_the_batch(model, x):
    """A [T, B, d] layer that is given [B, T, d]."""
    return model(x, x, x, need_weights=False)[0].square().mean()


@mixing("view", "reshape", batch=lambda: (torch.randn(4, 5, 6), torch.randn(4, 3)))
def scrambled_by_view(model, x, y):
    """[B, T, d] read as [T, B, d] without a transpose."""
    hidden = model(x).reshape(5, 4, 3)
    return (hidden.mean(0) - y).square().mean()


@mixing("view", "reshape", "add", "mean", batch=lambda: (torch.randn(4, 5, 6),))
def scrambled_then_pooled(model, x):
    pooled = model(x.reshape(5, 4, 6)).mean(0)
    return pooled.square().mean()


@mixing("max")
def scaled_by_the_largest(model, x, y):
    hidden = model(x)
    return F.cross_entropy(hidden / hidden.abs().max(), y)


@mixing("index")
def shuffled_targets(model, x, y):
    order = torch.tensor([2, 0, 3, 1])
    return F.cross_entropy(model(x)[order], y)


@mixing("flip")
def flipped_over_the_batch(model, x, y):
    return F.cross_entropy(model(x).flip(0), y)


@mixing("sqrt", "mean", batch=lambda: (torch.randn(4, 6), torch.randn(4, 3)))
def root_of_the_mean(model, x, y):
    return F.mse_loss(model(x), y).sqrt()


@mixing("exp", "mean", "log", batch=lambda: (torch.randn(4, 6), torch.randn(4, 3)))
def exponential_of_the_mean(model, x, y):
    """Perplexity as a loss."""
    return F.mse_loss(model(x), y).exp()


@mixing("mul", "mean", "pow", batch=lambda: (torch.randn(4, 6), torch.randn(4, 3)))
def product_of_two_batch_losses(model, x, y):
    hidden = model(x)
    return F.mse_loss(hidden, y) * hidden.abs().mean()


@mixing("var", "mean")
def variance_penalty(model, x, y):
    hidden = model(x)
    return F.cross_entropy(hidden, y) + 0.1 * hidden.var(0).sum()


@mixing("mm")
def decorrelation(model, x, y):
    """Barlow twins: the cross-correlation matrix of the features over the batch."""
    hidden = model(x)
    correlation = hidden.T @ hidden / x.shape[0]
    return (correlation - torch.eye(3)).square().sum()


@mixing("cdist", "sub", "mm", "unsqueeze", "expand", "view")
def pairwise_distances(model, x, y):
    hidden = model(x)
    return (hidden[:, None] - hidden[None]).square().sum(-1).mean()


@mixing("cdist")
def pairwise_cdist(model, x, y):
    hidden = model(x)
    return torch.cdist(hidden, hidden).mean()


@mixing("slice", "sub")
def neighbours_in_the_batch(model, x, y):
    hidden = model(x)
    return (hidden[1:] - hidden[:-1]).square().mean()


@mixing("median", "sort", "kthvalue")
def scaled_by_the_median(model, x, y):
    hidden = model(x)
    return F.cross_entropy(hidden / (hidden.median(0).values.abs() + 1), y)


@mixing("logsumexp", "amax", "max", "exp", "sum", "log")
def logsumexp_over_the_batch(model, x, y):
    return model(x).logsumexp(0).sum()


@mixing("mm")
def constant_matrix_over_the_batch(model, x, y):
    mix = torch.arange(16.0).view(4, 4) / 16
    return F.cross_entropy(mix @ model(x), y)


@mixing("slice", "select", "index")
def first_sample_as_reference(model, x, y):
    hidden = model(x)
    return (hidden - hidden[0]).square().mean()


@mixing("slice", "select", "index", "sum", "mean")
def first_half_only(model, x, y):
    """Half of the samples have no loss: whose is the mean?"""
    hidden = model(x)
    return (hidden[: x.shape[0] // 2] * hidden[x.shape[0] // 2 :]).mean()


@mixing("topk", "sort")
def hardest_samples(model, x, y):
    losses = F.cross_entropy(model(x), y, reduction="none")
    return losses.topk(2).values.mean()


@mixing("max", "amax")
def worst_sample(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none").max()


@mixing("conv", batch=lambda: (torch.randn(4, 6),))
def convolution_over_the_batch(model, x):
    hidden = model(x).t()[None]
    return F.conv1d(hidden, torch.ones(1, 3, 2)).square().mean()


@mixing("div", "sum", "mean", batch=lambda: (torch.randn(4, 6), torch.rand(4)))
def weights_normalised_by_the_model(model, x, weight):
    """The normaliser depends on the parameters: a sample's share depends on the others'."""
    scores = model(x)
    gates = scores[:, 0].sigmoid()
    return (gates * scores[:, 1].square()).sum() / gates.sum()


@mixing("index_add", "scatter", "index_put")
def sums_by_group(model, x, y):
    """Samples of one class are pooled before a nonlinear loss."""
    sums = torch.zeros(3, 3).index_add(0, y, model(x))
    return sums.square().sum()


class NotLinear(torch.autograd.Function):
    """A weight whose gradient, a sum over samples, is changed in a way that is not linear."""

    @staticmethod
    def forward(ctx, weight, how):
        ctx.how = how
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.how == "exponential":
            return torch.linalg.matrix_exp(gradient), None
        return gradient / gradient, None


@mixing("linalg_matrix_exp", model=lambda: nn.Linear(6, 6))
def exponential_of_a_gradient(model, x, y):
    return F.cross_entropy(x @ NotLinear.apply(model.weight, "exponential"), y)


@mixing("div", model=lambda: nn.Linear(6, 6))
def gradient_divided_by_itself(model, x, y):
    return F.cross_entropy(x @ NotLinear.apply(model.weight, "quotient"), y)


class Table(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


def by_sample(x):
    """Rows (sample, time)."""
    return x.flatten(0, 1)


def by_time(x):
    """Rows (time, sample)."""
    return x.transpose(0, 1).flatten(0, 1)


def two_sequences():
    return torch.randn(4, 8, 5), torch.randn(4, 8, 2)


def tokens_and_rows():
    return torch.randint(5, (4, 8)), torch.randn(4, 8, 2)


@mixing("aten.mm.default pairs different samples", model=lambda: Table(5, 2), batch=two_sequences)
def product_of_rows_in_different_order(model, x, z):
    return (model.weight * (by_sample(x).T @ by_time(z))).sum() / x.shape[0]


@mixing("aten.bmm.default pairs different samples", model=lambda: Table(3, 5, 2),
        batch=two_sequences)
def batched_product_of_rows_in_different_order(model, x, z):
    left, right = by_sample(x).T.expand(3, -1, -1), by_time(z).expand(3, -1, -1)
    return (model.weight * torch.bmm(left, right)).sum() / x.shape[0]


@mixing("aten.mm.default contracts the batch axis", model=lambda: Table(4, 4),
        batch=lambda: (torch.randn(4, 4),))
def product_of_a_square_batch_with_itself(model, x):
    return (model.weight * (x @ x)).sum() / x.shape[0]


@mixing("pairs different samples", model=lambda: Table(5), batch=two_sequences)
def matrix_times_vector_in_different_order(model, x, z):
    return (model.weight * torch.mv(by_sample(x).T, by_time(z)[:, 0])).sum() / x.shape[0]


@mixing("aten.index_put.default pairs different samples", model=lambda: Table(5, 2),
        batch=tokens_and_rows)
def rows_scattered_by_tokens_in_different_order(model, tokens, z):
    table = torch.zeros(5, 2).index_put((by_sample(tokens),), by_time(z), accumulate=True)
    return (model.weight * table).sum() / z.shape[0]


class Rows(nn.Module):
    """More rows than samples."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 3))
        self.register_buffer("rows", torch.randn(9, 2))


def places():
    return (torch.randint(3, (4, 2)),)


@mixing("by its position", model=Rows, batch=places)
def row_of_a_weight_by_position(model, places):
    return model.weight.gather(1, places).square().mean()


@mixing("aten.scatter_add.default writes", model=Rows, batch=places)
def row_of_a_buffer_by_position(model, places):
    mixed = torch.zeros(places.shape[0], 3).scatter_add(1, places, model.rows)
    return (mixed * model.weight[0]).square().mean()


@mixing("aten.scatter_add.default pairs different samples", model=lambda: Table(5, 2),
        batch=tokens_and_rows)
def entries_scattered_by_tokens_in_different_order(model, tokens, z):
    index = by_sample(tokens).unsqueeze(1).expand(-1, 2)
    table = torch.zeros(5, 2).scatter_add(0, index, by_time(z))
    return (model.weight * table).sum() / z.shape[0]


class MemoryBank(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("bank", torch.zeros(4, 3))
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x):
        return self.net(x)


@mixing("average", model=MemoryBank)
def running_mean_in_a_buffer(model, x, y):
    model.average.mul_(0.9).add_(0.1 * x.mean(0))
    return F.cross_entropy(model(x), y)


@mixing("bank", model=MemoryBank)
def memory_bank(model, x, y):
    hidden = model(x)
    model.bank.copy_(hidden.detach())
    return F.cross_entropy(hidden, y)


@mixing("bank", model=MemoryBank)
def one_sample_in_a_buffer(model, x, y):
    model.bank[0] = x[1, :3]
    return F.cross_entropy(model(x), y)


@mixing("bank", model=MemoryBank)
def buffer_replaced_by_data(model, x, y):
    model.bank = x[:, :3] * 2
    return F.cross_entropy(model(x), y)


@mixing("bmm", "mm", "einsum", model=TiedHead,
        batch=lambda: (torch.randint(11, (4, 5)), torch.randint(11, (4, 5))))
def einsum_across_samples(model, ids, target):
    logits = model(ids)
    scores = torch.einsum("atv,btv->ab", logits, logits)
    return scores.square().mean()


@pytest.mark.parametrize("strategy", STRATEGIES[:1])
@pytest.mark.parametrize("name", MIXING)
def test_refused(name, strategy):
    loss, build, make_batch, words = MIXING[name]
    model, batch = build(), make_batch()
    step = fn.dp_step(max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=4,
                      lowering="eager", strategy=strategy)(make_step(loss))
    with pytest.raises(fn.PrivacyError) as caught:
        step(model, *batch)
    assert all(param.grad is None for param in model.parameters())
    text = str(caught.value)
    assert any(word.lower() in text.lower() for word in words), text
    assert "test_mixing.py" in text, text
    assert REMEDY.search(text), text


def test_refused_through_torch_compile():
    model, (x, y) = mlp(), xy(6)
    options = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "expected_batch_size": 4,
               "lowering": "eager"}
    step = torch.compile(make_step(rolled_over_the_batch), backend="flashnorm", options=options)
    with pytest.raises(Exception, match="roll") as caught:
        step(model, x, y)
    assert isinstance(caught.value, fn.PrivacyError) or isinstance(
        caught.value.__cause__, fn.PrivacyError
    )
    assert all(param.grad is None for param in model.parameters())


def test_refused_again_on_the_next_call():
    """A refusal is not remembered as "run this one in plain eager mode"."""
    model, (x, y) = mlp(), xy(6)
    step = fn.dp_step(max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=4,
                      lowering="eager")(make_step(rolled_over_the_batch))
    for _ in range(3):
        with pytest.raises(fn.PrivacyError):
            step(model, x, y)
        assert all(param.grad is None for param in model.parameters())


def test_buffer_is_left_alone_by_a_refused_step():
    model, (x, y) = MemoryBank(), xy(6)
    step = fn.dp_step(max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=4,
                      lowering="eager")(make_step(running_mean_in_a_buffer))
    with pytest.raises(fn.PrivacyError):
        step(model, x, y)
    assert torch.equal(model.average, torch.zeros(6))


def test_the_line_is_the_users():
    """The message quotes the offending line, not only its file."""
    model, (x, y) = mlp(), xy(6)
    step = fn.dp_step(max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=4,
                      lowering="eager")(make_step(running_total_over_the_batch))
    with pytest.raises(fn.PrivacyError, match=r"cumsum\(0\)"):
        step(model, x, y)
