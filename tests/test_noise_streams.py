"""No two releases of a process share their noise, unless the caller repeats a run."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

import flashnorm_compile as fn
from flashnorm_compile.noise_streams import repeat_noise

NONE = torch.zeros(0, 6)


def make(seed=0):
    def function(model, x):
        model(x).square().mean().backward()

    return fn.dp_step(
        function, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=1,
        lowering="eager", seed=seed,
    )


def noise(step, model=None):
    """One release without samples."""
    model = model or nn.Linear(6, 4)
    model.zero_grad()
    step(model, NONE)
    return model.weight.grad.clone()


def test_steps_with_one_seed_draw_different_noise():
    first, second = make(seed=101), make(seed=101)
    draws = [noise(step) for step in (first, second, first, second)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert not torch.equal(one, other)


def test_program_run_again_repeats_all_its_noise():
    def program():
        torch._dynamo.reset()
        return torch.stack([noise(step) for step in (make(seed=102), make(seed=102), make(103))])

    with repeat_noise():
        first = program()
    with repeat_noise():
        second = program()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, program())


def test_older_state_is_refused_while_its_process_lives():
    step = make(seed=None)
    saved = step.state_dict()
    noise(step)
    with pytest.raises(fn.PrivacyError, match=r"release 0 was drawn before.*leave the state"):
        step.load_state_dict(saved)
    assert step.state_dict()["releases"] == 1, "a refused state was half loaded"


def test_one_state_is_continued_once():
    step = make(seed=None)
    noise(step)
    saved = step.state_dict()
    one, other = make(seed=None), make(seed=None)
    one.load_state_dict(saved)
    other.load_state_dict(saved)
    noise(one)
    model = nn.Linear(6, 4)
    with pytest.raises(fn.PrivacyError, match="noise of release 1 was drawn before"):
        noise(other, model)
    assert model.weight.grad is None


def test_newest_state_may_be_loaded_again():
    step = make(seed=None)
    noise(step)
    step.load_state_dict(step.state_dict())
    noise(step)


def test_state_of_a_repeated_run_does_not_repeat_noise_outside():
    with repeat_noise():
        inside = make(seed=None)
        saved = inside.state_dict()
        noise(inside)
    with pytest.raises(fn.PrivacyError, match="was drawn before"):
        make().load_state_dict(saved)


def test_copies_share_the_numbering():
    step = make()
    stream = step._state.noise
    assert copy.deepcopy(stream) is stream


def test_step_of_another_process_is_refused(monkeypatch):
    step = make()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(fn.PrivacyError, match="before this process was forked"):
        noise(step)
