"""Empties the gradients that a step may have left, wherever its parameters are known from."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from flashnorm_compile.optimizers import discard_gradients


def discard_reachable(function: Callable[..., Any], values: Iterable[Any]) -> None:
    """Empty ``.grad`` of all that a function can reach, and of all in ``values``.

    Modules, optimizers and tensors are found among the values, in containers, among the variables
    that a function captures or reads, and among the attributes of a method's object.
    """
    pending = [function, *values]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) not in seen:
            seen.add(id(value))
            _discard(value)
            pending.extend(_parts(value))


def _discard(value: Any) -> None:
    if isinstance(value, torch.nn.Module):
        value.zero_grad(set_to_none=True)
    elif isinstance(value, torch.optim.Optimizer):
        discard_gradients(value)
    elif isinstance(value, torch.Tensor) and value.is_leaf:
        value.grad = None


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__func__, value.__self__, *getattr(value.__self__, "__dict__", {}).values()]
    if inspect.isfunction(value):
        read = inspect.getclosurevars(value)
        # Not into the functions of libraries.
        data = [each for each in read.globals.values() if not inspect.isfunction(each)]
        return [*read.nonlocals.values(), *data]
    return []
