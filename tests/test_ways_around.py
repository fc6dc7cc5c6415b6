"""Ways around the compiled step, each found by trying: refused, and nothing raw is left."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flashnorm_compile as fn

OPTIONS = {
    "max_grad_norm": 1e-3,
    "noise_multiplier": 0.0,
    "expected_batch_size": 4,
    "lowering": "eager",
}


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


def batch():
    return torch.randn(4, 3), torch.tensor([0, 1, 1, 0])


def private(function=cross_entropy, **options):
    return fn.dp_step(function, **{**OPTIONS, **options})


def empty(model):
    return all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("disabled", [False, True])
def test_gradients_enabled_inside_and_not_outside(disabled):
    model, step = nn.Linear(3, 2), private(torch.enable_grad()(cross_entropy))
    refused = r"without \(torch\.no_grad\)|without a private graph"
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(disable=disabled),
        pytest.raises(fn.PrivacyError, match=refused),
    ):
        step(model, *batch())
    assert empty(model)


def test_evaluation_without_gradients_goes_on():
    model, (x, y) = nn.Linear(3, 2), batch()
    with torch.no_grad():
        torch.testing.assert_close(private()(model, x, y), cross_entropy(model, x, y))


@pytest.mark.parametrize("outside", [
    lambda first, second: torch.max(first, second),
    lambda first, second: first.clamp(min=1e6) + second,
    lambda first, second: first * 0 + second,
    lambda first, second: torch.where(first > second, first, second),
])
def test_a_loss_left_out_by_what_it_is(outside):
    model = nn.Linear(3, 2)
    step = private(lambda model, x, y: (model(x)[:, 0].mean(), model(x)[:, 1].mean()))
    with pytest.raises(fn.PrivacyError, match="the gradient 0: something outside"):
        outside(*step(model, *batch())).backward()
    assert empty(model)


def test_a_loss_that_is_not_differentiated():
    model = nn.Linear(3, 2)
    step = private(lambda model, x, y: (model(x)[:, 0].mean(), model(x)[:, 1].mean()))
    step(model, *batch())[1].backward()
    assert model.weight.grad[0].abs().sum() == 0
    assert model.weight.grad[1].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_microbatches_in_half_precision(dtype):
    model = nn.Linear(3, 2, bias=False).to(dtype)
    step = private(lambda model, x: model(x).sum(), loss_reduction="sum")
    with pytest.raises(fn.PrivacyError, match="rounded to it before the noise"), step.accumulate():
        step(model, torch.randn(4, 3, dtype=dtype)).backward()
    assert empty(model)


def test_parameters_of_others_in_the_same_optimizer():
    model, other, (x, y) = nn.Linear(3, 2), nn.Linear(3, 2), batch()
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], 1.0)
    before = other.weight.detach().clone()
    (private()(model, x, y) + cross_entropy(other, x, y)).backward()
    with pytest.raises(fn.PrivacyError, match="parameter 2 of the optimizer has a gradient that"):
        optimizer.step()
    assert torch.equal(other.weight, before)
    assert empty(model)
    assert empty(other)


@pytest.mark.parametrize("size", [1, 4])
def test_an_assert_on_samples(size):
    """As Dynamo traces the statement, where pytest has not rewritten it."""

    def step(model, x, y):
        torch._assert_async((x.abs() < 100).all(), "a sample is large")
        return cross_entropy(model, x, y)

    x, y = batch()
    with pytest.raises(fn.PrivacyError, match=r"depends on samples: aten\._assert_async"):
        private(step)(nn.Linear(3, 2), x[:size], y[:size])


def test_an_assert_on_weights():
    def step(model, x, y):
        torch._assert_async(torch.isfinite(model.weight).all(), "diverged")
        return cross_entropy(model, x, y)

    model = nn.Linear(3, 2)
    private(step)(model, *batch()).backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("size", [1, 4])
def test_bounds_of_classes_that_torch_checks(size):
    """Lookups check them too, in their kernels."""

    def step(model, x, y):
        return (model(x) - F.one_hot(y, 2)).square().mean()

    x, y = batch()
    model = nn.Linear(3, 2)
    private(step)(model, x[:size], y[:size]).backward()
    assert model.weight.grad is not None


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


def test_samples_in_a_dataclass_that_a_buffer_holds_too():
    class Centred(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("last", last)

        def forward(self, x):
            return self.linear(x - self.last.mean(0))

    x, y = batch()
    step = private(lambda model, batch: cross_entropy(model, batch.x, batch.y))
    with pytest.raises(fn.PrivacyError, match=r"shares its memory with model\.last"):
        step(Centred(x), Batch(x, y))


def centred(model, x, y):
    return cross_entropy(model, x - x.mean(0), y)


class Trainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(3, 2)

    def training_step(self, x, y):
        return centred(self.model, x, y)


class PlainTrainer:
    def __init__(self):
        self.model = nn.Linear(3, 2)

    def training_step(self, x, y):
        return centred(self.model, x, y)


def forward(model, x, y):
    return centred(model, x, y)


@pytest.mark.parametrize(("function", "leading", "in_dims"), [
    (centred, True, (None, 0)),
    (forward, True, (None, 0)),
    (Trainer().training_step, False, (0, None)),
    (PlainTrainer().training_step, False, (0, None)),
])
def test_in_dims_count_the_arguments_of_the_call(function, leading, in_dims):
    """One place further, the samples would count as a constant, and may mix."""
    arguments = (nn.Linear(3, 2), *batch()) if leading else batch()
    with pytest.raises(fn.PrivacyError, match="mixes samples"):
        private(function, in_dims=in_dims)(*arguments)


@pytest.mark.parametrize("size", [0, 4])
def test_a_parameter_computed_outside(size):
    base = torch.randn(3, 2, requires_grad=True)
    step = private(lambda w, x, y: F.cross_entropy(x @ w, y), in_dims={"w": None})
    x, y = batch()
    with pytest.raises(fn.PrivacyError, match="w is not a leaf"):
        step(base * 2, x[:size], y[:size])


@pytest.mark.parametrize("size", [1, 4])
def test_a_model_without_its_loss(size):
    with pytest.raises(fn.PrivacyError, match=r"only outputs of shape \[B, 2\]"):
        private(lambda model, x: model(x))(nn.Linear(3, 2), batch()[0][:size])


def test_functional_gradients_without_autograd():
    def step(model, x, y):
        def loss(parameters):
            return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

        gradients = torch.func.grad(loss)(dict(model.named_parameters()))
        for name, parameter in model.named_parameters():
            parameter.sub_(gradients[name])

    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    compiled = torch.compile(step, backend="flashnorm", options=OPTIONS)
    with torch.no_grad(), pytest.raises(fn.PrivacyError, match=r"differentiates with torch\.func"):
        compiled(model, *batch())
    assert torch.equal(model.weight, before)


def test_steps_that_overlap_in_two_threads():
    """Each thread's backward passes are watched, whichever step ends first."""
    inside, ended, refused = threading.Event(), threading.Event(), []
    other, model, (x, y) = nn.Linear(3, 2), nn.Linear(3, 2), batch()

    @torch.compiler.disable
    def raw_backward():
        inside.set()
        ended.wait(60)
        cross_entropy(other, x, y).backward()

    def slow(model, x, y):
        loss = cross_entropy(model, x, y)
        loss.backward()
        raw_backward()

    def run():
        try:
            private(slow)(model, x, y)
        except fn.PrivacyError as error:
            refused.append(str(error))

    def first():
        with fn._torch.before_backward(lambda roots: None):
            thread.start()
            inside.wait(60)

    thread = threading.Thread(target=run)
    first()
    ended.set()
    thread.join(60)
    assert empty(other)
    assert "would compute a gradient" in refused[0]
