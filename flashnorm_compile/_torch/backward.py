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


_in_this_thread = threading.local()


@contextlib.contextmanager
def before_backward(check: Check) -> Iterator[None]:
    """Call ``check`` with the tensors that each backward pass of this thread starts from."""
    _watch()
    before = getattr(_in_this_thread, "checks", ())
    _in_this_thread.checks = (*before, check)
    try:
        yield
    finally:
        _in_this_thread.checks = before


@functools.cache
def before_backward_in(backend: Callable[..., Any], check: Check) -> None:
    """Call ``check`` for each backward pass inside a function compiled with ``backend``."""
    _watch()
    _by_backend.append((backend, check))


_by_backend: list[tuple[Callable[..., Any], Check]] = []


@functools.cache
def _watch() -> None:
    """Look at every backward pass of this process before it runs."""
    run_backward = torch.autograd._engine_run_backward

    @torch.compiler.disable
    def checked(roots: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        # The compiler differentiates what it traces; nothing is computed then.
        if TracingContext.try_get() is None:
            for check in getattr(_in_this_thread, "checks", ()):
                check(roots)
            for backend, check in _by_backend:
                if _is_inside(backend):
                    check(roots)
        return run_backward(roots, *args, **kwargs)

    torch.autograd._engine_run_backward = checked


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
