"""Which gradients are released ones: as they arrived in ``.grad``, and untouched since."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from flashnorm_compile.weak import WeakTensorDict


class _Mark(NamedTuple):
    """How a released gradient looked when it was put into ``.grad``.

    An address alone says little: the allocator gives it to the next gradient. The tensor object
    is the released one as long as it lives, and its version counts the writes to it. Writes
    through ``.data`` are not counted; nothing short of reading the values would see them.
    """

    grad: weakref.ref[torch.Tensor]
    pointer: int
    version: int
    releases: int


# parameter → its last private gradient.
_marks: WeakTensorDict[_Mark] = WeakTensorDict()


def mark_private(parameter: torch.Tensor, releases: int = 1) -> None:
    """Record a parameter's present ``.grad`` as the sum of so many releases."""
    grad = parameter.grad
    if grad is not None:
        _marks[parameter] = _Mark(weakref.ref(grad), grad.data_ptr(), grad._version, releases)


def came_from_us(parameter: torch.Tensor) -> bool:
    """Return whether a parameter's ``.grad`` is a released one, untouched since."""
    mark, grad = _marks.get(parameter), parameter.grad
    if mark is None or grad is None or mark.grad() is not grad:
        return False
    return bool(grad._version == mark.version and grad.data_ptr() == mark.pointer)


def was_released(parameter: torch.Tensor) -> bool:
    """Return whether a parameter's ``.grad`` is the tensor that was released, written to or not."""
    mark, grad = _marks.get(parameter), parameter.grad
    return mark is not None and grad is not None and mark.grad() is grad


def releases_in(parameter: torch.Tensor) -> int:
    """Return how many releases were added up in a parameter's ``.grad``."""
    mark = _marks.get(parameter)
    return 0 if mark is None else mark.releases
