"""The last look at gradients: before an optimizer uses them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.released import came_from_us, releases_in
from flashnorm_compile.state import StepState

_in_this_thread = threading.local()


@contextlib.contextmanager
def running(state: StepState) -> Iterator[None]:
    """Mark a private step as running: an optimizer that steps inside it is checked too."""
    before = _running_step()
    _in_this_thread.running = state
    try:
        yield
    finally:
        _in_this_thread.running = before


def _running_step() -> StepState | None:
    return getattr(_in_this_thread, "running", None)


@functools.cache
def guard_optimizers() -> None:
    """Check the gradients before every step of every optimizer of this process."""
    register_optimizer_step_pre_hook(_check_optimizer)


@torch.compiler.disable
def _check_optimizer(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Check the gradients before a step, and again after each run of its closure."""
    _check_gradients(optimizer)
    return (
        (args[0], *(_checked(optimizer, value) for value in args[1:])),
        {name: _checked(optimizer, value) for name, value in kwargs.items()},
    )


def _checked(optimizer: torch.optim.Optimizer, value: Any) -> Any:
    """Return a closure that checks the gradients it leaves; anything else as it is."""
    if not callable(value):
        return value

    @torch.compiler.disable(recursive=False)
    @functools.wraps(value)
    def closure(*args: Any, **kwargs: Any) -> Any:
        result = value(*args, **kwargs)
        _check_gradients(optimizer)
        return result

    return closure


def _check_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Refuse to use a gradient that is not private, inside a step or beside its parameters."""
    parameters = _parameters_of(optimizer)
    owners = [StepState.owner(parameter) for parameter in parameters]
    around = _running_step() or next((state for state in owners if state is not None), None)
    for position, (parameter, state) in enumerate(zip(parameters, owners, strict=True)):
        step = state or around
        if step is None:
            continue
        if step.accumulating:
            raise PrivacyError(
                "optimizer.step() ran inside accumulate(), before the noise was added. Call it "
                "after the accumulate() block."
            )
        if parameter.grad is None:
            continue
        name = f"parameter {position} of the optimizer"
        if state is not None:
            name = state.parameters.get(parameter, name)
        if not came_from_us(parameter):
            discard_gradients(optimizer)
            raise PrivacyError(
                f"{name} has a gradient that did not come out of a private backward, or was "
                "changed since. All gradients were discarded. Every use of a trained parameter "
                "belongs into the compiled step; leave .grad alone between backward() and "
                "optimizer.step(): no clip_grad_norm_, scaling or averaging (the step has clipped "
                "and averaged), and zero_grad() with set_to_none=True."
            )
        if releases_in(parameter) > 1:
            raise PrivacyError(
                f"{name}.grad holds {releases_in(parameter)} releases. Call optimizer.zero_grad() "
                "before each step, or use accumulate() to add up microbatches with one noise."
            )


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def discard_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Empty ``.grad`` of every parameter of an optimizer."""
    for parameter in _parameters_of(optimizer):
        parameter.grad = None
