"""Between a forward and its backward, and between ``.grad`` and what arrives in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flashnorm_compile as fn

CLIP, EXPECTED = 0.5, 4


class Accountant:
    def __init__(self):
        self.recorded = []

    def record(self, *, noise_multiplier, sampling_rate):
        self.recorded.append(noise_multiplier)


def square(model, x):
    return model(x).square().mean()


def make(function=square, noise_multiplier=0.0, **options):
    settings = {"max_grad_norm": CLIP, "expected_batch_size": EXPECTED, "lowering": "eager"}
    step = fn.dp_step(function, noise_multiplier=noise_multiplier, **{**settings, **options})
    return nn.Linear(6, 3), step


def batch(size=4):
    return torch.randn(size, 6)


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def empty(model):
    return all(parameter.grad is None for parameter in model.parameters())


def test_backward_after_the_block_of_its_forward_is_refused():
    accountant = Accountant()
    model, step = make(noise_multiplier=10.0, accountant=accountant, sampling_rate=0.1)
    step(model, batch()).backward()
    model.zero_grad()
    with step.accumulate():
        loss = step(model, batch())
    model.zero_grad()
    recorded = len(accountant.recorded)
    with pytest.raises(fn.PrivacyError, match=r"inside an accumulate\(\) block and its backward"):
        loss.backward()
    assert empty(model)
    assert len(accountant.recorded) == recorded


def test_backward_in_another_block_is_refused():
    model, step = make()
    step(model, batch())
    with step.accumulate():
        loss = step(model, batch())
    model.zero_grad()
    with (
        pytest.raises(fn.PrivacyError, match=r"inside an accumulate\(\) block and its backward"),
        step.accumulate(),
    ):
        loss.backward()


def test_forward_before_the_block_of_its_backward_is_refused():
    model, step = make()
    loss = step(model, batch())
    with (
        pytest.raises(fn.PrivacyError, match=r"before the accumulate\(\) block and its backward"),
        step.accumulate(),
    ):
        loss.backward()
    assert empty(model)


@pytest.mark.parametrize(("setting", "value"), [("noise_multiplier", 5.0), ("max_grad_norm", 2.0)])
def test_setting_changed_between_forward_and_backward_is_refused(setting, value):
    accountant = Accountant()
    model, step = make(accountant=accountant, sampling_rate=0.1)
    loss = step(model, batch())
    setattr(step, setting, value)
    changed = f"{setting} was 0.[05] in the forward and is {value}"
    with pytest.raises(fn.PrivacyError, match=changed):
        loss.backward()
    assert empty(model)
    assert accountant.recorded == []


def test_recorded_noise_is_the_forwards():
    accountant = Accountant()
    model, step = make(noise_multiplier=3.0, accountant=accountant, sampling_rate=0.1)
    step(model, batch()).backward()
    assert accountant.recorded == [3.0]


def test_gradients_do_not_leave_through_autograd_grad_while_accumulating():
    model, step = make(noise_multiplier=10.0)
    x = batch()
    with step.accumulate():
        taken = torch.autograd.grad(step(model, x), list(model.parameters()), allow_unused=True)
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(step(model, x), list(model.parameters()))
    assert taken == (None, None)


def test_autograd_grad_outside_accumulate_gives_the_release():
    model, step = make()
    x = batch()
    step(model, x).backward()
    taken = torch.autograd.grad(step(model, x), list(model.parameters()))
    torch.testing.assert_close(list(taken), gradients(model))


def test_gradient_from_a_tensor_that_is_no_leaf_is_refused_while_accumulating():
    base = torch.randn(3, 6, requires_grad=True)
    step = make(lambda w, x: F.linear(x, w).square().mean(), in_dims=(None, 0))[1]
    with (
        pytest.raises(fn.PrivacyError, match=r"is not a leaf"),
        step.accumulate(),
    ):
        step(base * 2, batch()).backward()
    assert base.grad is None


def test_raw_gradient_is_seen_behind_a_release_already_in_grad():
    model, step = make()
    step(model, batch()).backward()
    with pytest.raises(fn.PrivacyError, match="from outside the compiled step"):
        (step(model, batch()) + 1000 * square(model, batch())).backward()
    assert empty(model)


def test_raw_gradient_is_seen_while_accumulating():
    model, step = make()
    with (
        pytest.raises(fn.PrivacyError, match="from outside the compiled step"),
        step.accumulate(),
    ):
        (step(model, batch()) + 1000 * square(model, batch())).backward()
    assert empty(model)


def test_two_forwards_in_one_backward():
    model, step = make()
    x = batch(6)
    step(model, x).backward()
    whole = gradients(model)
    model.zero_grad()
    with step.accumulate():
        (step(model, x[:4]) + step(model, x[4:])).backward()
    torch.testing.assert_close(gradients(model), whole)
    model.zero_grad()
    with pytest.raises(fn.PrivacyError, match="from outside the compiled step"):
        (step(model, x[:4]) + step(model, x[4:])).backward()


def test_releases_add_up_in_the_same_tensor():
    model, step = make()
    x = batch()
    step(model, x).backward()
    first, tensors = gradients(model), [p.grad for p in model.parameters()]
    step(model, x).backward()
    torch.testing.assert_close(gradients(model), [2 * g for g in first])
    assert all(p.grad is t for p, t in zip(model.parameters(), tensors, strict=True))


class Interrupt(torch.autograd.Function):
    """Ctrl-C somewhere in the backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise KeyboardInterrupt


def test_interrupt_in_a_backward_leaves_no_sum_without_noise():
    model, step = make(noise_multiplier=5.0)
    # Made first, so that it runs last.
    interrupt = Interrupt.apply(nn.Parameter(torch.ones(())))
    with pytest.raises(KeyboardInterrupt), step.accumulate():
        (step(model, batch()) + interrupt).backward()
    assert empty(model)
    assert not step._state.sums
    step(model, batch()).backward()


def test_refusing_accountant_leaves_no_sum_without_noise():
    class Refusing:
        def record(self, **release):
            raise ValueError("budget spent")

    model, step = make(noise_multiplier=5.0, accountant=Refusing(), sampling_rate=0.1)
    with pytest.raises(ValueError, match="budget spent"), step.accumulate():
        step(model, batch()).backward()
    assert empty(model)
    assert not step._state.sums


def test_gradient_put_there_inside_accumulate_is_refused_before_the_release():
    accountant = Accountant()
    model, step = make(noise_multiplier=5.0, accountant=accountant, sampling_rate=0.1)
    with (
        pytest.raises(fn.PrivacyError, match=r"already holds a gradient that is not private"),
        step.accumulate(),
    ):
        step(model, batch()).backward()
        model.bias.grad = torch.ones(3)
    assert accountant.recorded == []
    assert model.weight.grad is None


def test_frozen_parameters_get_no_noise_from_accumulate():
    model, step = make(noise_multiplier=5.0)
    step(model, batch()).backward()
    model.zero_grad()
    model.bias.requires_grad_(False)
    with step.accumulate():
        step(model, batch()).backward()
    assert model.bias.grad is None
    assert model.weight.grad is not None


def test_release_of_another_step_may_stay_in_grad():
    """Two steps take turns, as for a GAN: one keeps the other's network in its graph, detached."""
    generator, discriminator = nn.Linear(3, 6), nn.Linear(6, 1)
    options = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "expected_batch_size": 4}

    @fn.dp_step(**options, lowering="eager")
    def fool(generator, discriminator, z):
        F.softplus(-discriminator(generator(z))).mean().backward()

    @fn.dp_step(**options, lowering="eager")
    def judge(discriminator, generator, z):
        F.softplus(discriminator(generator(z).detach())).mean().backward()

    z = torch.randn(4, 3)
    fool(generator, discriminator, z)
    kept = generator.weight.grad
    before = kept.clone()
    discriminator.zero_grad()
    judge(discriminator, generator, z)
    assert generator.weight.grad is kept
    torch.testing.assert_close(kept, before, rtol=0, atol=0)
    torch.optim.SGD(generator.parameters()).step()


def test_zeroed_gradients_are_no_foreign_ones():
    model, step = make()
    x = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step(model, x).backward()
    first, tensor = gradients(model), model.weight.grad
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        step(model, x).backward()
        torch.testing.assert_close(gradients(model), first)
        assert model.weight.grad is tensor
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with step.accumulate():
        step(model, x).backward()
    torch.testing.assert_close(gradients(model), first)
    optimizer.step()


def test_zeroed_gradient_of_a_layer_that_was_skipped_is_zero():
    layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    optimizer = torch.optim.SGD(layers.parameters(), lr=1.0)

    def function(layers, x, both):
        hidden = layers[1](x) if both else x
        return layers[0](hidden).square().mean()

    _, step = make(function)
    step(layers, batch(), True).backward()
    optimizer.zero_grad(set_to_none=False)
    step(layers, batch(), False).backward()
    assert layers[1].weight.grad.abs().max() == 0
    before = layers[1].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(layers[1].weight.detach(), before, rtol=0, atol=0)


def test_gradient_changed_but_not_zeroed_is_refused():
    model, step = make()
    step(model, batch()).backward()
    model.weight.grad.mul_(0.5)
    with pytest.raises(fn.PrivacyError, match=r"set_to_none"):
        step(model, batch()).backward()


@pytest.mark.parametrize("accumulate", [False, True])
def test_backward_to_chosen_inputs_reports_norms(accumulate):
    model, step = make()
    x = batch()
    step(model, x).backward()
    whole, norms = gradients(model), step.per_sample_norms
    model.zero_grad()
    if accumulate:
        with step.accumulate():
            step(model, x).backward(inputs=list(model.parameters()))
    else:
        step(model, x).backward(inputs=list(model.parameters()))
    torch.testing.assert_close(step.per_sample_norms, norms)
    torch.testing.assert_close(gradients(model), whole)


def test_loss_scaled_outside_is_refused_for_chosen_inputs():
    model, step = make()
    with pytest.raises(fn.PrivacyError, match="did not start from the loss"):
        (1000 * step(model, batch())).backward(inputs=[model.weight])
    assert empty(model)
