"""Ctrl-C as a request to stop after the current step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether the user asked to stop."""

    made: bool = False

    def __call__(self) -> bool:
        """Return whether to stop."""
        return self.made


@contextmanager
def stop_on_interrupt(notify: Callable[[], None]) -> Iterator[StopRequest]:
    """Turn the first Ctrl-C into a stop request; a second one interrupts at once.

    A step is not cut in half: weights, optimizer and accountant stay in agreement.

    Args:
        notify: called when the request is made.
    """
    request = StopRequest()
    previous = signal.getsignal(signal.SIGINT)

    def handle(_number: int, _frame: FrameType | None) -> None:
        request.made = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        notify()

    signal.signal(signal.SIGINT, handle)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous)
