"""What Dynamo leaves to run without the compiler ends in an error, not in raw gradients."""

from __future__ import annotations

import contextlib
import threading

import helper_breaks
import pytest
import torch
from driver import gradients_of
from torch import nn
from zoo_dense import mlp

import flashnorm_compile as fn

OPTIONS = {
    "max_grad_norm": 1.0,
    "noise_multiplier": 0.0,
    "expected_batch_size": 4,
    "lowering": "eager",
}


class Net(nn.Module):
    """A module of the user's own: Dynamo compiles its forward where it skips the caller."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x)


@torch.compiler.disable(recursive=False)
def alone(model, x):
    hidden = model(x - x.mean(0))
    (100 * (hidden - hidden.mean(0))).square().mean().backward()


def in_a_disabled_function(model, x):
    alone(model, x)


def in_a_loop(model, x):
    for _ in range(1):
        hidden = model(x - x.mean(0))
        (100 * (hidden - hidden.mean(0))).square().mean().backward()


def in_a_try_block(model, x):
    try:
        hidden = model(x - x.mean(0))
        (100 * (hidden - hidden.mean(0))).square().mean().backward()
    finally:
        model.train()


@contextlib.contextmanager
def nothing_special():
    yield


def in_a_context(model, x):
    with nothing_special():
        hidden = model(x - x.mean(0))
        (100 * (hidden - hidden.mean(0))).square().mean().backward()


def under_a_lock(model, x):
    with threading.Lock():
        hidden = model(x - x.mean(0))
        (100 * (hidden - hidden.mean(0))).square().mean().backward()


@pytest.mark.parametrize(
    "function",
    [
        in_a_loop,
        in_a_try_block,
        in_a_context,
        under_a_lock,
        in_a_disabled_function,
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("promised", [False, True])
def test_a_skipped_function_around_the_forward(function, by_name, promised):
    """Its forward alone would be compiled, and the rest of it never seen."""
    options = OPTIONS | {"loss_outside": promised}
    if by_name:
        step = torch.compile(function, backend="flashnorm", options=options)
    else:
        step = fn.dp_step(function, **options)
    model = Net()
    with pytest.raises(fn.PrivacyError, match=r"which Dynamo leaves to run without the compiler"):
        step(model, torch.randn(4, 6))
    assert not any(gradients_of(model).values())


class Trainer:
    """After its first backward no tensor is left among the locals: Dynamo skips the rest."""

    def __init__(self):
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 4)
        self.x = torch.randn(4, 6)

    def step(self, x):
        self.first(x).square().mean().backward()
        (100 * self.second(self.x)).square().mean().backward()


@pytest.mark.parametrize("by_name", [False, True])
def test_a_backward_after_the_last_compiled_frame(by_name):
    trainer = Trainer()
    if by_name:
        step = torch.compile(trainer.step, backend="flashnorm", options=OPTIONS)
    else:
        step = fn.dp_step(trainer.step, **OPTIONS)
    with pytest.raises(fn.PrivacyError, match=r"would compute a gradient of .* not private"):
        step(torch.randn(4, 6))
    assert not any(gradients_of(trainer.second).values())
    if not by_name:
        assert not any(gradients_of(trainer.first).values())


def test_a_backward_of_other_parameters_hidden_from_the_compiler():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

    @torch.compiler.disable
    def hidden(model, x):
        model.b(x).square().mean().backward()

    @fn.dp_step(**OPTIONS)
    def step(model, x):
        model.a(x).square().mean().backward()
        hidden(model, x)

    model = Pair()
    with pytest.raises(fn.PrivacyError, match=r"would compute a gradient of .* not private"):
        step(model, torch.randn(4, 6))
    assert not any(gradients_of(model).values())


def test_gradients_asked_for_where_the_compiler_does_not_look():
    @torch.compiler.disable
    def hidden(model, x):
        return torch.autograd.grad(model(x).square().mean(), [*model.parameters()])

    @fn.dp_step(**OPTIONS)
    def step(model, x):
        model(x).square().mean().backward()
        hidden(model, x)

    with pytest.raises(fn.PrivacyError, match=r"would compute a gradient of"):
        step(mlp(), torch.randn(4, 6))


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_stance_that_leaves_the_next_call_to_eager(stance):
    @fn.dp_step(**OPTIONS)
    def step(model, x):
        model(x).square().mean().backward()

    model = mlp()
    step(model, torch.randn(4, 6))
    model.zero_grad()
    other = mlp()
    other[0].weight.requires_grad_(False)
    expected = r"not private|ran without a private graph"
    with torch.compiler.set_stance(stance), pytest.raises(fn.PrivacyError, match=expected):
        step(other, torch.randn(4, 6))
    assert not any(gradients_of(other).values())


def test_other_threads_run_their_own_backward():
    """The check is for the step's thread alone."""
    public, errors = mlp(), []

    @torch.compiler.disable
    def elsewhere():
        def train():
            try:
                public(torch.randn(4, 6)).square().mean().backward()
            except fn.PrivacyError as error:
                errors.append(error)

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()

    @fn.dp_step(**OPTIONS)
    def step(model, x):
        model(x).square().mean().backward()
        elsewhere()

    step(mlp(), torch.randn(4, 6))
    assert not errors
    assert all(grad is not None for grad in gradients_of(public).values())


@pytest.mark.parametrize("by_name", [False, True])
def test_a_break_in_a_function_of_another_file(by_name):
    """The break's line is there; the step that it splits is here."""

    def function(model, x):
        helper_breaks.centre(x)
        model(x).square().mean().backward()

    if by_name:
        step = torch.compile(function, backend="flashnorm", options=OPTIONS)
    else:
        step = fn.dp_step(function, **OPTIONS)
    model = mlp()
    with pytest.raises(fn.PrivacyError, match=r"graph break before the forward .*helper_breaks"):
        step(model, torch.randn(4, 6))
    assert not any(gradients_of(model).values())


def test_weights_loaded_in_the_step():
    """A break in torch's own files."""

    @fn.dp_step(**OPTIONS)
    def step(model, x):
        model.load_state_dict({"weight": x[:3], "bias": x[0, :3]})
        model(x).square().mean().backward()

    model = nn.Linear(6, 3)
    with pytest.raises(fn.PrivacyError):
        step(model, torch.randn(4, 6))
    assert not any(gradients_of(model).values())
