"""Dynamo's settings, and the ways around it that no setting closes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import trace_rules
from torch._dynamo.exc import FailOnRecompileLimitHit

_LOGGING_METHODS = ("debug", "info", "warning", "warning_once", "error", "critical", "log")


@contextlib.contextmanager
def strict_dynamo() -> Iterator[None]:
    """Make Dynamo fail where it would run a frame without the compiler, and skip logger calls."""
    # The switch is per process: the limit must not turn a private step into an eager one.
    with dynamo_config.patch(
        suppress_errors=False,
        fail_on_recompile_limit_hit=True,
        ignore_logging_functions=_ignored_logging_functions(),
    ):
        yield


def skip_logging_for(backend: Callable[..., Any]) -> None:
    """Skip logger calls in what ``torch.compile`` traces for ``backend``, and nowhere else."""
    # Dynamo asks a backend nothing before it has traced; it only tells that a compilation starts.
    from torch._dynamo.callback import callback_handler

    compilation = contextlib.ExitStack()

    # A backward is compiled while Dynamo looks at new frames: it must not look at these.
    @torch.compiler.disable
    def start(*_: Any) -> None:
        if _traces_for(backend):
            compilation.enter_context(
                dynamo_config.patch(ignore_logging_functions=_ignored_logging_functions())
            )

    @torch.compiler.disable
    def end(*_: Any) -> None:
        compilation.close()

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)


def _traces_for(backend: Callable[..., Any]) -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_compile" and "compiler_fn" in frame.f_locals:
            return getattr(frame.f_locals["compiler_fn"], "compiler_fn", None) is backend
        frame = frame.f_back
    return False


@functools.cache
def before_module_compile(check: Callable[[torch.nn.Module], None], backend: Any) -> None:
    """Call ``check`` for modules that ``Module.compile`` would leave to run as they are."""
    compile_module = torch.nn.Module.compile

    @functools.wraps(compile_module)
    def checked(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("backend") in (backend, "flashnorm") and _is_left_out(self):
            check(self)
        compile_module(self, *args, **kwargs)

    torch.nn.Module.compile = checked  # type: ignore[method-assign]


def left_out_module() -> torch.nn.Module | None:
    """Return the module whose ``compile`` runs now, if it would leave the module as it is."""
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if frame.f_code.co_name == "compile" and isinstance(module, torch.nn.Module):
            return module if _is_left_out(module) else None
        frame = frame.f_back
    return None


def _is_left_out(module: torch.nn.Module) -> bool:
    # Before torch 2.15, Dynamo skips a frame of torch's own, such as nn.Sequential's forward.
    mended = hasattr(torch._dynamo.OptimizedModule, "_should_wrap_module_call_impl")
    return not mended and bool(trace_rules.check(module.forward))


def _ignored_logging_functions() -> set[Any]:
    return set(dynamo_config.ignore_logging_functions) | _logging_functions()


def _logging_functions() -> set[Any]:
    classes: set[type] = {logging.Logger, logging.RootLogger, logging.getLoggerClass()}
    found = {
        method
        for cls in classes
        for name in _LOGGING_METHODS
        if callable(method := getattr(cls, name, None))
    }
    found |= {getattr(logging, name) for name in _LOGGING_METHODS if hasattr(logging, name)}
    # torch 2.11 writes this setting into its compilation log as sorted JSON, which functions are
    # not; from 2.13 on it leaves the setting out.
    old = torch.__version__.split(".")[:2] < ["2", "13"]
    return {_NamedFunction(function) for function in found} if old else found


class _NamedFunction(str):
    """A function's name that a set finds by the function."""

    function: Callable[..., Any]

    def __new__(cls, function: Callable[..., Any]) -> _NamedFunction:
        name = super().__new__(cls, getattr(function, "__qualname__", repr(function)))
        name.function = function
        return name

    def __hash__(self) -> int:
        return hash(self.function)

    def __eq__(self, other: object) -> bool:
        return other is self.function or (
            isinstance(other, _NamedFunction) and other.function is self.function
        )


RecompileLimitError = FailOnRecompileLimitHit


def require_strict_dynamo() -> None:
    """Make later frames of this process fail rather than fall back to eager in silence."""
    dynamo_config.suppress_errors = False
    dynamo_config.fail_on_recompile_limit_hit = True


def requested_dynamic() -> bool | None:
    """Return ``dynamic`` of the ``torch.compile`` that is compiling."""
    if not dynamo_config.assume_static_by_default:
        return True
    return None if dynamo_config.automatic_dynamic_shapes else False


def dynamo_is_disabled() -> bool:
    """Return whether Dynamo runs every function as it is."""
    return os.environ.get("TORCHDYNAMO_DISABLE", "") == "1" or bool(dynamo_config.disable)
