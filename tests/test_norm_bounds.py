"""What one sample adds to the sum is at most C, also where its tokens nearly cancel.

The sample is alone in its batch, but for one whose gradient is zero: the step's gradient is what
it contributes.
"""

from __future__ import annotations

import pytest
import torch
from driver import make_step
from torch import nn
from torch.nn import functional as F

import flashnorm_compile as fn

STRATEGIES = ("ghost", "auto")
WITH_KERNELS = [("ghost", "library"), ("auto", "library"), ("ghost", "fused"), ("flash", "fused")]
#: In float32: rounding in the worst case (see ``passes/sites/rounding.py``).
FLOAT32 = 1.0025
#: In bfloat16 the scaled operand is rounded once more.
BFLOAT16 = 1.032
#: How far tokens are from cancelling.
DISTANCES = (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1.0)


def private(loss, bound, strategy="ghost", kernels="library"):
    return fn.dp_step(max_grad_norm=bound, noise_multiplier=0.0, loss_reduction="sum",
                      lowering="eager", strategy=strategy, kernels=kernels)(make_step(loss))


def contribution(step, model, batch):
    """Return the norm of what the one sample contributes, and the norm that was computed."""
    model.zero_grad()
    step(model, *batch)
    grads = [param.grad.double().flatten() for param in model.parameters()]
    assert step.nonfinite_samples == 0
    return torch.cat(grads).norm().item(), step.per_sample_norms[0].item()


def alone(x):
    """Put a sample of zeros behind a sample."""
    return torch.stack([x, torch.zeros_like(x)])


def cancelling(tokens, *shape, distance, size=10.0):
    """Return tokens that are equal but for ``distance``, and signs that sum to zero."""
    x = size * torch.randn(shape) + distance * torch.randn(tokens, *shape)
    signs = torch.tensor([1.0, -1.0]).repeat(tokens // 2)
    return x, signs


class Reused(nn.Module):
    """One weight, met several times."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


def assert_bounded(loss, model, batch, *, limit=FLOAT32, bounds=(1.0,), cases=DISTANCES,
                   seeds=1, strategy="ghost", kernels="library"):
    """Assert ‖contribution‖ ≤ C for the sample ``batch(case)``, for every case."""
    step = private(loss, bounds[0], strategy, kernels)
    for bound in bounds:
        step.max_grad_norm = bound
        for case in cases:
            for seed in range(seeds):
                torch.manual_seed(seed)
                size, norm = contribution(step, model, batch(case))
                assert size <= bound * limit, f"{size} at {bound}, {case}; computed norm {norm}"


@pytest.mark.parametrize(("strategy", "kernels"), WITH_KERNELS)
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("tokens", [2, 16, 64])
def test_linear_with_tokens(tokens, scale, strategy, kernels):
    def batch(distance):
        x, signs = cancelling(tokens, 256, distance=distance)
        return (alone(x), alone(signs))

    def loss(model, x, signs):
        return (model(x).sum(2) * signs * scale).sum()

    assert_bounded(loss, nn.Linear(256, 256, bias=False), batch,
                   bounds=(1e-3, 1.0, 30.0), strategy=strategy, kernels=kernels)


@pytest.mark.parametrize(("strategy", "kernels"), WITH_KERNELS)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_that_cancel_at_equal_tokens(scale, strategy, kernels):
    def batch(distance):
        x = torch.randn(1, 64) + distance * torch.randn(16, 64)
        weights = torch.randn(16, 64)
        weights = weights - weights.mean(0)
        return (alone(x), alone(weights))

    def loss(model, x, weights):
        return (model(x) * weights * scale).sum()

    assert_bounded(loss, nn.Linear(64, 64, bias=False), batch, strategy=strategy, kernels=kernels)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_towers_that_share_a_weight(scale, strategy):
    """Cross terms cancel the squares of the two calls."""

    def batch(distance):
        left = 10 * torch.randn(256)
        right = left + distance * torch.randn(256)
        return (alone(left), alone(right))

    def loss(model, left, right):
        difference = F.linear(left, model.weight) - F.linear(right, model.weight)
        return (difference * scale).sum()

    assert_bounded(loss, Reused(256, 256), batch, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_towers_with_tokens_that_share_a_transposed_weight(strategy):
    def batch(distance):
        left = 10 * torch.randn(4, 48)
        right = left + distance * torch.randn(4, 48)
        return (alone(left), alone(right))

    def loss(model, left, right):
        first = (left @ model.weight * 100 * right).sum()
        second = (F.linear(right, model.weight) * 100 * left).sum()
        return first - second

    assert_bounded(loss, Reused(48, 48), batch, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_embedding_of_repeated_tokens(scale, strategy):
    def batch(distance):
        tokens = torch.tensor([3, 5, 3, 3, 5, 3, 3, 3])
        rows = torch.randn(1, 64)
        signs = torch.tensor([1, 1, 1, -1, -1, -1, 1, -1.0]).unsqueeze(1)
        weights = 10 * signs * rows + distance * torch.randn(8, 64)
        return (alone(tokens), alone(weights))

    def loss(model, tokens, weights):
        return (model(tokens) * weights * scale).sum()

    assert_bounded(loss, nn.Embedding(11, 64), batch,
                   bounds=(1e-2, 1.0), strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_table_tied_to_a_head(strategy):
    """The head's gradient cancels the embedding's."""

    def batch(distance):
        tokens = torch.tensor([3, 5, 3])
        hidden = 100 * torch.randn(3, 32)
        weights = hidden + distance * torch.randn(3, 32)
        return (alone(tokens), alone(hidden), alone(weights))

    def loss(model, tokens, hidden, weights):
        logits = F.linear(hidden, model.weight)
        picked = logits.gather(2, tokens.unsqueeze(2)).sum()
        return picked - (F.embedding(tokens, model.weight) * weights).sum()

    assert_bounded(loss, Reused(11, 32), batch, strategy=strategy)


@pytest.mark.parametrize("exponent", [-10, -11, -12, -13, -14])
def test_a_materialized_head_that_cancels_a_token(exponent):
    """The head's square is added to the embedding's: it must be as precise as the others."""

    def batch():
        hidden, scores, own = torch.zeros(700, 300), torch.zeros(700, 120), torch.zeros(1, 300)
        hidden[0] = torch.randn(300) * 1e6
        scores[0, 0] = 1
        own[0] = hidden[0] * (1 + 2.0**exponent)
        return tuple(map(alone, (torch.tensor([0]), hidden, scores, own)))

    def loss(model, tokens, hidden, scores, own):
        head = (F.linear(hidden, model.weight) * scores).sum()
        return head - (F.embedding(tokens, model.weight) * own).sum()

    step = private(loss, 1.0, "auto")
    for seed in range(12):
        torch.manual_seed(seed)
        size, norm = contribution(step, Reused(120, 300), batch())
        assert size <= FLOAT32, f"{size}; computed norm {norm}"
    assert {"ghost", "materialize"} == set(step.plan.rows[0].choices)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_table_met_twice(strategy):
    def batch(distance):
        tokens = torch.tensor([3, 5, 3])
        weights = 100 * torch.randn(3, 32)
        others = weights + distance * torch.randn(3, 32)
        return (alone(tokens), alone(weights), alone(others))

    def loss(model, tokens, weights, others):
        first = (F.embedding(tokens, model.weight) * weights).sum()
        return first - (F.embedding(tokens.flip(1), model.weight) * others.flip(1)).sum()

    assert_bounded(loss, Reused(11, 32), batch, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_position_embedding(strategy):
    """Several positions share a row."""

    def batch(distance):
        weights, signs = cancelling(8, 32, distance=distance, size=1e4)
        return (alone(weights), alone(signs))

    def loss(model, weights, signs):
        rows = model(torch.arange(8) // 4)
        return (rows * weights * signs.unsqueeze(2)).sum()

    assert_bounded(loss, nn.Embedding(6, 32), batch, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(8, 8, 1, bias=False), (8, 16)),
        (nn.Conv2d(4, 6, 1, bias=False), (4, 4, 4)),
        (nn.Conv1d(8, 8, 1, groups=4, bias=False), (8, 16)),
        (nn.ConvTranspose1d(8, 8, 1, bias=False), (8, 16)),
    ],
    ids=["1d", "2d", "grouped", "transposed"],
)
def test_convolution(layer, size, strategy):
    def batch(distance):
        pixel = 100 * torch.randn(size[0], *(1,) * (len(size) - 1))
        x = pixel + distance * torch.randn(size)
        signs = torch.tensor([1.0, -1.0]).repeat(8).view(1, *size[1:])
        return (alone(x), alone(signs))

    def loss(model, x, signs):
        return (model(x) * signs * 1e3).sum()

    assert_bounded(loss, layer, batch, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batched_product(strategy):
    """A weight for each of several heads."""

    def batch(distance):
        x, signs = cancelling(6, 64, distance=distance)
        return (alone(x), alone(signs))

    def loss(model, x, signs):
        heads = torch.einsum("btd,hde->bhte", x, model.weight)
        return (heads.sum((1, 3)) * signs * 1e3).sum()

    assert_bounded(loss, Reused(3, 64, 64), batch, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, strategy):
    """Scaled entries are rounded: tokens that sum to zero no longer do."""

    def batch(distance):
        x = torch.randn(1, 64) + distance * torch.randn(9, 64)
        a = torch.randn(1, 64).to(dtype)
        rows = torch.cat([a * 1.5, -a, -a / 2] * 3)
        return alone(x.to(dtype)), alone(rows)

    def loss(model, x, rows):
        return (model(x) * rows * 100).float().sum()

    assert_bounded(loss, nn.Linear(64, 64, bias=False).to(dtype), batch, limit=BFLOAT16,
                   bounds=(1.0, 1.37), seeds=4, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(256,), (2, 256)], ids=str)
def test_factors_of_very_different_size(shape, strategy):
    """Squares of a tiny activation are zero in float32; its product with the gradient is not."""

    def batch(_):
        return alone(1e-24 * torch.rand(shape)), alone(1e17 * torch.rand(shape))

    def loss(model, x, weights):
        return (model(x) * weights).sum()

    assert_bounded(loss, nn.Linear(256, 256, bias=False), batch, bounds=(1e-6,), cases=(0,),
                   strategy=strategy)


@pytest.mark.parametrize("tokens", [64, 512])
def test_orthogonal_tokens_keep_their_norm(tokens):
    """The bound is for samples that cancel: tokens that are merely unlike leave n as it is."""
    torch.manual_seed(0)
    x, _ = torch.linalg.qr(torch.randn(512, tokens))
    model = nn.Linear(512, 512, bias=False)

    def loss(model, x, weights):
        return (model(x) * weights).sum()

    weights = torch.randn(tokens, 512)
    step = private(loss, 1e6)
    _, norm = contribution(step, model, (alone(x.T.contiguous()), alone(weights)))
    expected = (x @ weights).norm().item()
    assert norm == pytest.approx(expected, rel=1e-5)


def test_nonfinite_sample_is_left_out():
    model = nn.Linear(8, 8, bias=False)
    x = torch.ones(3, 4, 8)
    x[1, 2, 3], x[2, 0, 0] = float("nan"), float("inf")

    @fn.dp_step(max_grad_norm=1.0, noise_multiplier=0.0, loss_reduction="sum", lowering="eager",
                strategy="ghost")
    def step(model, x):
        loss = model(x).sum()
        loss.backward()
        return loss.detach()

    step(model, x)
    assert step.nonfinite_samples == 2
    assert model.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
