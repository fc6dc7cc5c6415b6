"""The autograd engine: where a backward pass starts and ends."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._guards import TracingContext

Check = Callable[[Sequence[torch.Tensor]], None]


@contextlib.contextmanager
def before_backward(check: Check) -> Iterator[None]:
    """Call ``check`` with the tensors that each backward pass of this thread starts from."""
    run_backward = torch.autograd._engine_run_backward
    thread = threading.get_ident()
    torch.autograd._engine_run_backward = _checked(
        run_backward, lambda: threading.get_ident() == thread, check
    )
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = run_backward


@functools.cache
def before_backward_in(backend: Callable[..., Any], check: Check) -> None:
    """Call ``check`` for each backward pass inside a function compiled with ``backend``."""
    torch.autograd._engine_run_backward = _checked(
        torch.autograd._engine_run_backward, lambda: _is_inside(backend), check
    )


def _checked(
    run_backward: Callable[..., Any], applies: Callable[[], bool], check: Check
) -> Callable[..., Any]:
    @torch.compiler.disable
    def checked(roots: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        # The compiler differentiates what it traces; nothing is computed then.
        if TracingContext.try_get() is None and applies():
            check(roots)
        return run_backward(roots, *args, **kwargs)

    return checked


def _is_inside(backend: Callable[..., Any]) -> bool:
    """Whether a function that ``torch.compile`` made for a backend is running in this thread."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":
            wrapped = frame.f_locals.get("callback")
            while wrapped is not None and not hasattr(wrapped, "compiler_fn"):
                wrapped = getattr(wrapped, "_torchdynamo_orig_backend", None)
            if getattr(wrapped, "compiler_fn", None) is backend:
                return True
        frame = frame.f_back
    return False


def queue_backward_callback(callback: Callable[[], None]) -> None:
    """Run a callback at the end of the backward pass that is under way."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)
