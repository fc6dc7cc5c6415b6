"""What a step leaves behind outside its gradients: nothing that was computed from samples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import flashnorm_compile as fn

OPTIONS = {
    "max_grad_norm": 1.0,
    "noise_multiplier": 0.0,
    "expected_batch_size": 4,
    "lowering": "eager",
}


class Banked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("bank", torch.zeros(6))
        self.register_buffer("steps", torch.zeros(()))
        self.average = copy.deepcopy(self.linear).requires_grad_(False)

    def forward(self, x):
        return self.linear(x)


def private_loss(model, x):
    model(x).square().mean().backward()


def in_the_forward(model, x):
    model.bank.add_(x.mean(0))
    private_loss(model, x)


def one_sample_in_the_forward(model, x):
    model.bank[2] = x[0, 0]
    private_loss(model, x)


def size_in_the_forward(model, x):
    model.steps.add_(x.shape[0])
    loss = model(x).square().mean()
    loss.backward()


def size_as_ones_in_the_forward(model, x):
    model.bank.copy_(torch.ones(x.shape[0], 6).sum(0))
    loss = model(x).square().mean()
    loss.backward()


def to_data_of_a_parameter(model, x):
    loss = model(x).square().mean()
    loss.backward()
    model.linear.weight.data.add_(100 * x.mean(0))
    return loss.detach()


def as_data_of_a_buffer(model, x):
    loss = model(x).square().mean()
    loss.backward()
    model.bank.data = x.mean(0)
    return loss.detach()


def to_a_buffer(model, x):
    private_loss(model, x)
    model.bank.add_(x.mean(0))


def to_a_buffer_without_gradients(model, x):
    private_loss(model, x)
    with torch.no_grad():
        model.bank.lerp_(model(x).mean(0), 0.1)


@torch.no_grad()
def remember(model, x):
    model.bank.copy_(x[0])


def to_a_buffer_in_a_function(model, x):
    private_loss(model, x)
    remember(model, x)


def to_a_parameter(model, x):
    private_loss(model, x)
    with torch.no_grad():
        model.linear.bias.add_(x.mean())


def to_a_parameter_before_the_loss(model, x):
    with torch.no_grad():
        model.average.bias.add_(x.mean())
    torch._dynamo.graph_break()


def by_gradients_of_its_own(model, x):
    parameters = dict(model.linear.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model.linear, parameters, (x,)).square().mean()

    grads = torch.func.grad(loss)(parameters)
    with torch.no_grad():
        for name, parameter in model.linear.named_parameters():
            parameter.sub_(grads[name])


def the_loss_itself(model, x):
    loss = model(x).square().mean()
    loss.backward()
    model.bank.add_(loss.detach())


@pytest.mark.parametrize(
    "function",
    [
        in_the_forward,
        one_sample_in_the_forward,
        size_in_the_forward,
        size_as_ones_in_the_forward,
        to_data_of_a_parameter,
        as_data_of_a_buffer,
        to_a_buffer,
        to_a_buffer_without_gradients,
        to_a_buffer_in_a_function,
        to_a_parameter,
        to_a_parameter_before_the_loss,
        by_gradients_of_its_own,
        the_loss_itself,
    ],
)
@pytest.mark.parametrize(
    "lowering", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
@pytest.mark.parametrize("by_name", [False, True])
def test_data_written_into_a_model_is_refused(function, lowering, by_name):
    """Before or after the gradients, where no graph of the private kind looks."""
    options = OPTIONS | {"lowering": lowering}
    if by_name:
        step = torch.compile(function, backend="flashnorm", options=options)
    else:
        step = fn.dp_step(function, **options)
    model = Banked()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = r"depends on (samples|the number of samples)|differentiates with torch\.func"
    with pytest.raises(fn.PrivacyError, match=expected):
        step(model, torch.randn(4, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_follows_from_private_gradients_is_free():
    """Post-processing: own optimizers, averages of weights, counters."""

    @fn.dp_step(**OPTIONS)
    def step(model, x):
        loss = model(x).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.linear.parameters():
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
            model.average.weight.lerp_(model.linear.weight, 0.5)
            model.steps.add_(1)
        return loss.detach() * 2

    model = Banked()
    before = model.linear.weight.clone()
    for _ in range(2):
        step(model, torch.randn(4, 6))
    assert model.steps == 2
    assert not torch.equal(model.linear.weight, before)


@pytest.mark.parametrize(
    "lowering", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_state_without_samples_is_kept_up(lowering):
    """A counter, and an average of weights, in the middle of the forward."""

    @fn.dp_step(**OPTIONS | {"lowering": lowering})
    def step(model, x):
        model.steps.add_(1)
        with torch.no_grad():
            model.average.weight.lerp_(model.linear.weight, 0.5)
        model(x).square().mean().backward()

    model = Banked()
    before = model.average.weight.clone()
    with torch.no_grad():
        model.linear.weight.add_(1)
    for size in (4, 1, 3):
        model.zero_grad()
        step(model, torch.randn(size, 6))
    assert model.steps == 3
    torch.testing.assert_close(model.average.weight, before + 1 - 0.5**3)


def test_evaluation_of_a_compiled_model_writes_what_it_likes():
    """Batch statistics, say: without gradients the backend by name is any backend."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    compiled = torch.compile(model, backend="flashnorm", options=OPTIONS)
    with torch.no_grad():
        compiled(torch.randn(4, 6))
    assert model[1].num_batches_tracked == 1


def test_gradients_of_torch_func_do_not_leave_as_they_are():
    def step(model, x):
        def loss(weight):
            return (x @ weight).square().mean()

        return torch.func.grad(loss)(model.weight.detach())

    compiled = torch.compile(step, backend="flashnorm", options=OPTIONS)
    with pytest.raises(fn.PrivacyError, match=r"differentiates with torch\.func outside"):
        compiled(nn.Linear(6, 6), torch.randn(4, 6))


def test_a_plain_attribute_of_a_module_may_hold_samples():
    @fn.dp_step(**OPTIONS)
    def step(model, x):
        loss = model(x).square().mean()
        loss.backward()
        with torch.no_grad():
            model.steps.add_(model.last_batch.sum())
        return loss.detach()

    model = Banked()
    model.last_batch = torch.randn(4, 6)
    with pytest.raises(fn.PrivacyError, match=r"depends on samples into model\.steps"):
        step(model, model.last_batch)
    assert model.steps == 0
