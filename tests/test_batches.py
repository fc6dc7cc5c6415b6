"""Batches at the edges: not finite, of one, empty, of changing size; and the fine print of B."""

from __future__ import annotations

import pytest
import torch
from driver import (
    EXPECTED_BATCH_SIZE,
    STRATEGIES,
    Case,
    bound_that_clips_some,
    call,
    check_case,
    clip,
    gradients_of,
    private_step,
    read_result,
    run_oracle,
    run_private,
)
from oracle import assert_matches_oracle
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from zoo_dense import mlp
from zoo_modules import all_cases

import flashnorm_compile as fn

CASES = all_cases()

#: One case per kind of site; each takes any batch size.
EDGE_CASES = (
    "dense-mlp",
    "dense-layer_norm",
    "dense-time_first",
    "dense-bilinear_time_axis",
    "conv-cnn_max_pool",
    "conv-conv1d_grouped",
    "sharing-embedding",
    "sharing-tied_head",
    "sharing-weight_and_its_transpose",
    "attention-positions_expanded",
    "attention-class_token_expand",
    "parameters-scalar_parameter",
    "parameters-orthogonal_householder",
    "parameters-orthogonal_matrix_exp",
    "parameters-orthogonal_cayley",
    "parameters-channels_last_weight",
    "losses-token_mean",
    "losses-sum",
)


def floating(batch):
    """Return the floating tensors of a batch."""
    leaves = batch.values() if isinstance(batch, dict) else batch
    return [leaf for leaf in leaves if leaf.is_floating_point()]


@pytest.mark.parametrize("strategy", ["materialize", "ghost"])
@pytest.mark.parametrize("name", [
    "dense-mlp", "dense-layer_norm", "dense-bilinear", "conv-conv1d_grouped",
    "parameters-scalar_parameter", "parameters-orthogonal_householder",
    "parameters-orthogonal_matrix_exp", "parameters-orthogonal_cayley",
])
def test_sample_that_is_not_finite_contributes_zero(name, strategy):
    case = CASES[name]
    model, batch = case.build_model(), case.build_batch()
    per_sample = run_oracle(case, batch)
    bound = bound_that_clips_some(per_sample.norms)
    clean = clip(per_sample, bound, case.loss_reduction)
    # Without sample 2: what the other three give.
    expected = {
        grad: clean.grads[grad]
        - clean.factors[2] * per_sample.by_name[grad][2] / EXPECTED_BATCH_SIZE
        for grad in clean.grads
    }
    step = private_step(
        case.loss, max_grad_norm=bound, strategy=strategy, loss_reduction=case.loss_reduction
    )
    for value in (float("nan"), float("inf")):
        floating(batch)[0][2].fill_(value)
        poisoned = clip(run_oracle(case, batch), bound, case.loss_reduction)
        model.zero_grad()
        actual = read_result(step, model, call(step, model, batch))
        for grad, want in expected.items():
            torch.testing.assert_close(actual.grads[grad].double(), want, rtol=1e-5, atol=1e-7)
        assert actual.nonfinite_samples == 1
        assert actual.factors[2] == 0
        assert_matches_oracle(
            poisoned, norms=actual.norms, factors=actual.factors, grads=actual.grads
        )


def test_activation_that_overflows_in_one_sample():
    """The input is finite, its activations are not."""
    case = Case(
        "overflow",
        lambda: nn.Linear(6, 3),
        lambda size: (torch.randn(size, 6), torch.randn(size, 3)),
        lambda model, x, y: (model(x).exp() - y).square().mean(),
    )
    batch = case.build_batch()
    batch[0][1] = 1e4
    expected = clip(run_oracle(case, batch), 1.0, "mean")
    actual = run_private(case, "auto", "eager", batch=batch)
    assert actual.nonfinite_samples == 1
    assert_matches_oracle(expected, norms=actual.norms, factors=actual.factors, grads=actual.grads)


def test_finite_gradient_whose_square_overflows():
    """Norm 1e25: its square is no float32. The sample is bounded by C or dropped, never inf."""
    case = Case(
        "huge", lambda: nn.Linear(6, 3), lambda size: (torch.randn(size, 6),),
        lambda model, x: model(x).mean(),
    )
    batch = case.build_batch()
    batch[0][1] = 1e25
    actual = run_private(case, "auto", "eager", batch=batch)
    total = torch.cat([grad.flatten() for grad in actual.grads.values()])
    assert torch.isfinite(total).all()
    assert total.norm() <= 4 / EXPECTED_BATCH_SIZE * 1.001


def test_every_sample_not_finite():
    case = CASES["dense-mlp"]
    batch = case.build_batch()
    batch[0].fill_(float("nan"))
    actual = run_private(case, "auto", "eager", batch=batch)
    assert actual.nonfinite_samples == 4
    for grad in actual.grads.values():
        assert torch.equal(grad, torch.zeros_like(grad))


def test_count_is_of_the_last_step():
    case = CASES["dense-mlp"]
    model, batch = case.build_model(), case.build_batch()
    step = private_step(case.loss)
    bad = (batch[0].clone(), batch[1])
    bad[0][0, 0] = float("nan")
    call(step, model, bad)
    assert step.nonfinite_samples == 1
    call(step, model, batch)
    assert step.nonfinite_samples == 0


@pytest.mark.parametrize("name", EDGE_CASES)
def test_batch_of_one(name):
    """One sample's gradient is the batch's: there is one strategy."""
    case = CASES[name]
    batch = case.build_batch(1)
    per_sample = run_oracle(case, batch)
    bound = float(per_sample.norms[0]) / 2
    expected = clip(per_sample, bound, case.loss_reduction)
    actual = run_private(case, "ghost", "eager", max_grad_norm=bound, batch=batch)
    assert_matches_oracle(expected, norms=actual.norms, factors=actual.factors, grads=actual.grads)


@pytest.mark.parametrize("strategy", ["materialize", "ghost"])
@pytest.mark.parametrize("name", EDGE_CASES)
def test_empty_batch_gives_zero_without_noise(name, strategy):
    """A Poisson batch may hold no sample: the step is then its noise alone."""
    case = CASES[name]
    with_samples = run_oracle(case)
    actual = run_private(case, strategy, "eager", batch=case.build_batch(0))
    assert actual.norms.shape == (0,)
    assert actual.factors.shape == (0,)
    assert actual.nonfinite_samples == 0
    for grad, value in actual.grads.items():
        if grad in with_samples.by_name:
            assert torch.equal(value, torch.zeros_like(value)), grad
        else:
            assert value is None


def test_empty_batch_with_noise():
    case = CASES["dense-mlp"]
    model = case.build_model()
    step = private_step(case.loss, noise_multiplier=2.0, max_grad_norm=3.0, seed=0)
    call(step, model, case.build_batch(0))
    with pytest.raises(fn.PrivacyError, match="Nothing was compiled yet: call the step with a"):
        _ = step.plan
    drawn = torch.cat([grad.flatten() for grad in gradients_of(model).values()])
    drawn = drawn * EXPECTED_BATCH_SIZE / 6.0
    assert drawn.numel() == 83
    # 83 standard normal draws: their mean square is 1 with standard deviation 0.155.
    assert 0.4 < drawn.square().mean() < 1.6


@pytest.mark.parametrize("name", [
    "dense-mlp", "conv-cnn_max_pool", "sharing-tied_head", "parameters-orthogonal_householder",
])
def test_batch_size_changes_without_recompiling(name):
    """Static at first, then with a symbolic batch size: at most two graphs of the step."""
    case = CASES[name]
    model = case.build_model()
    bound = bound_that_clips_some(run_oracle(case).norms)
    step = private_step(
        case.loss,
        max_grad_norm=bound,
        loss_reduction=case.loss_reduction,
        in_dims=None if case.in_dims is None else {"kwargs": case.in_dims},
    )
    compiled = []
    for size in (4, 7, 5, 3):
        batch = case.build_batch(size)
        expected = clip(run_oracle(case, batch), bound, case.loss_reduction)
        model.zero_grad()
        actual = read_result(step, model, call(step, model, batch))
        compiled.append(counters["stats"]["unique_graphs"])
        assert_matches_oracle(
            expected, norms=actual.norms, factors=actual.factors, grads=actual.grads
        )
    assert compiled[1] <= 2 * compiled[0], "more than one recompilation for the second size"
    assert compiled[1] == compiled[2] == compiled[3], "recompiled for the third size or later"


@pytest.mark.parametrize("name", ["sharing-tied_head", "losses-masked_token_mean"])
def test_batch_size_and_length_change_together(name):
    """B and T both symbolic: the inputs agree on B by value, if not by symbol."""
    case = CASES[name]
    model, step = case.build_model(), private_step(case.loss)
    for size, length in ((3, 6), (4, 6), (2, 5), (5, 3)):
        batch = case.build_batch(size)
        batch = tuple(part[:, :length].contiguous() for part in batch)
        expected = clip(run_oracle(case, batch), 1.0, case.loss_reduction)
        model.zero_grad()
        actual = read_result(step, model, call(step, model, batch))
        assert_matches_oracle(
            expected, norms=actual.norms, factors=actual.factors, grads=actual.grads
        )


def test_small_and_empty_batches_after_larger_ones():
    case = CASES["dense-mlp"]
    model, step = case.build_model(), private_step(case.loss)
    for size in (4, 6, 1, 0, 5, 1, 0, 3):
        batch = case.build_batch(size)
        model.zero_grad()
        actual = read_result(step, model, call(step, model, batch))
        if size == 0:
            assert all(torch.equal(g, torch.zeros_like(g)) for g in actual.grads.values())
            continue
        expected = clip(run_oracle(case, batch), 1.0, case.loss_reduction)
        assert_matches_oracle(
            expected, norms=actual.norms, factors=actual.factors, grads=actual.grads
        )


def test_gradient_does_not_depend_on_the_actual_batch_size():
    """The same sample, alone and among others that contribute nothing, gives the same gradient."""
    case = CASES["dense-mlp"]
    x, y = case.build_batch(1)
    alone = run_private(case, "auto", "eager", max_grad_norm=0.1, batch=(x, y))
    torch._dynamo.reset()
    padded = (torch.cat([x, torch.full((5, 6), float("nan"))]), y.repeat(6))
    among = run_private(case, "auto", "eager", max_grad_norm=0.1, batch=padded)
    for name, grad in alone.grads.items():
        torch.testing.assert_close(grad, among.grads[name])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sample_whose_mean_is_zero_over_zero(strategy):
    """``sum(losses * mask) / sum(mask)`` on a sample without labels: it contributes nothing."""
    case = CASES["losses-masked_token_mean"]
    ids, labels = case.build_batch()
    labels[1] = -100
    expected = clip(run_oracle(case, (ids, labels)), 1.0, "mean")
    actual = run_private(case, strategy, "eager", batch=(ids, labels))
    others = torch.tensor([0, 2, 3])
    torch.testing.assert_close(
        actual.norms[others].double(), expected.norms[others], rtol=1e-5, atol=1e-7
    )
    assert_matches_oracle(expected, norms=None, factors=None, grads=actual.grads)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_identical_samples_and_zero_gradients(strategy):
    """A sample whose gradient is exactly zero has norm 0, factor 1 and breaks nothing."""
    case = Case(
        "zeros",
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)),
        lambda size: (torch.randn(size, 6), torch.randn(size, 3)),
        lambda model, x, y: F.mse_loss(model(x), y),
    )
    x, y = case.build_batch()
    x[0], x[2], y[2] = 0.0, x[3], y[3]
    expected = clip(run_oracle(case, (x, y)), 0.5, "mean")
    actual = run_private(case, strategy, "eager", max_grad_norm=0.5, batch=(x, y))
    # Not 0: ghost norms never underflow (passes/sites/rounding.py).
    assert actual.norms[0] < 1e-14
    assert actual.factors[0] == 1
    assert_matches_oracle(expected, norms=actual.norms, factors=actual.factors, grads=actual.grads)


@pytest.mark.inductor
def test_batch_size_changes_with_inductor():
    case = CASES["sharing-tied_head"]
    model, step = case.build_model(), private_step(case.loss, lowering="inductor")
    for size in (4, 7, 5):
        batch = case.build_batch(size)
        expected = clip(run_oracle(case, batch), 1.0, "mean")
        model.zero_grad()
        actual = read_result(step, model, call(step, model, batch))
        assert_matches_oracle(
            expected, norms=actual.norms, factors=actual.factors, grads=actual.grads
        )


def test_one_large_case():
    """T beyond the batch and the widths, so that "auto" has a choice to make."""
    case = Case(
        "wide",
        lambda: nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 16)),
        lambda size: (torch.randn(size, 64, 48), torch.randn(size, 64, 16)),
        lambda model, x, y: F.mse_loss(model(x), y),
    )
    check_case(case, "auto")


def sizes_first(model, x, y):
    size, width = x.shape
    loss = F.cross_entropy(model(x.reshape(size, width)), y)
    loss.backward()
    return loss.detach() * size


def flattened_first(model, x, y):
    x = x.view(x.size(0), -1)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach() * x.shape[0]


@pytest.mark.parametrize("function", [sizes_first, flattened_first])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_step_that_reads_the_size_of_the_batch(function, by_name):
    """Before the forward and after it: a number at first, a symbol when traced again."""
    options = {
        "max_grad_norm": 0.4, "noise_multiplier": 0.0, "expected_batch_size": 4,
        "lowering": "eager",
    }
    if by_name:
        step = torch.compile(function, backend="flashnorm", options=options)
    else:
        step = fn.dp_step(function, **options)
    model = mlp()
    for size in (4, 7, 1, 3):
        x, y = torch.randn(size, 6), torch.randint(3, (size,))
        model.zero_grad()
        loss = step(model, x, y)
        torch.testing.assert_close(loss, F.cross_entropy(model(x), y).detach() * size)
        assert all(parameter.grad is not None for parameter in model.parameters())
