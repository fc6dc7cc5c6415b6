"""The largest batch that a method trains with in a given memory."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from methods import Method
from timing import synchronize

#: The search ends when the largest batch is known to 1/32 of it, or exactly.
PRECISION = 32
#: No search goes further; on a CPU, where memory has no limit to meet, it is a walk through.
CAP = {"cuda": 2**16, "cpu": 12}
MEMORY, TIME, LAST = "memory", "time", "cap"


@dataclass(frozen=True)
class Largest:
    """What the search found.

    Attributes:
        batch_size: the largest batch that fitted; 0 if none did.
        ended: what ended the search: MEMORY; TIME or LAST, if larger ones may fit; or an error.
        probes: the batch sizes in the order they were tried, and whether they fitted.
    """

    batch_size: int
    ended: str
    probes: list[tuple[int, bool]] = dataclasses.field(default_factory=list)


def search(
    fits: Callable[[int], bool], *, start: int, cap: int, in_time: Callable[[], bool]
) -> Largest:
    """Double, then bisect.

    An error other than a lack of memory ends the search; without a batch that fitted it is raised.
    """
    fitted, too_large = 0, None
    probes: list[tuple[int, bool]] = []
    size = min(start, cap)
    while in_time():
        try:
            probes.append((size, fits(size)))
        except Exception as error:
            # At some size indices overflow, or a kernel refuses: what fitted before is the answer.
            if not fitted:
                raise
            return Largest(fitted, f"{type(error).__name__} at {size}: {error}", probes)
        if not probes[-1][1]:
            too_large = size
        elif size == cap:
            return Largest(size, LAST, probes)
        else:
            fitted = size
        if too_large is None:
            # Odd sizes: nothing may depend on round ones.
            size = min(2 * fitted + 1, cap)
        elif too_large - fitted <= max(1, fitted // PRECISION):
            return Largest(fitted, MEMORY, probes)
        else:
            size = (fitted + too_large) // 2
    return Largest(fitted, TIME, probes)


def find_largest(make: Callable[[], Method], *, start: int, device: str, limit_s: float) -> Largest:
    """Search with real steps: forward, backward, noise and update, twice each.

    Methods that compile do so once, for any size. The others are made anew after a batch that did
    not fit: what hooks kept of it is gone then.
    """
    end = time.monotonic() + limit_s
    method: Method | None = None

    def fits(size: int) -> bool:
        nonlocal method
        if method is None:
            method = make()
            method.for_any_size()
            method.set_privacy(1.0, 1.0)
        fitted = _fits(method, size)
        if not (fitted or method.keeps_code):
            method = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        return fitted

    return search(fits, start=start, cap=CAP[device], in_time=lambda: time.monotonic() < end)


def _fits(method: Method, size: int) -> bool:
    try:
        method.resize(size)
        for _ in range(2):
            method.run()
        synchronize(method.settings.device)
    except torch.OutOfMemoryError:
        fitted = False
    else:
        fitted = True
    method.clear()
    return fitted
