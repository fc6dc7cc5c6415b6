"""The autograd engine: where a backward pass starts and ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._guards import TracingContext


@contextlib.contextmanager
def before_backward(check: Callable[[Sequence[torch.Tensor]], None]) -> Iterator[None]:
    """Call ``check`` with the tensors that each backward pass of this thread starts from."""
    run_backward = torch.autograd._engine_run_backward
    thread = threading.get_ident()

    @torch.compiler.disable
    def checked(roots: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        # The compiler differentiates what it traces; nothing is computed then.
        if threading.get_ident() == thread and TracingContext.try_get() is None:
            check(roots)
        return run_backward(roots, *args, **kwargs)

    torch.autograd._engine_run_backward = checked
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = run_backward


def queue_backward_callback(callback: Callable[[], None]) -> None:
    """Run a callback at the end of the backward pass that is under way."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)
