"""The Python frame that Dynamo compiles, what split it, and who called it."""

from __future__ import annotations

import dis
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class GraphBreak:
    """A graph break: why, and where.

    Attributes:
        reason: Dynamo's words.
        location: the line that broke the graph, which may lie in a function called.
        file, line, function: where that is in the function that Dynamo compiles; "" if unknown.
    """

    reason: str
    location: str
    file: str
    line: int
    function: str

    @property
    def summary(self) -> str:
        """The first lines of Dynamo's reason, on one line."""
        lines = [line.strip() for line in self.reason.splitlines() if line.strip()]
        return " ".join(lines[:2])

    @property
    def is_backward(self) -> bool:
        """Whether the break is the expected one, at ``backward()``."""
        known = ("Tensor.backward()", "TensorVariable() backward")
        # torch 2.11 goes on into Tensor.backward and stops at the call inside.
        inside = "torch.autograd.backward(" in self.location
        return inside or any(text in self.reason for text in known)

    @property
    def is_optimizer(self) -> bool:
        """Whether the break is inside an optimizer's own methods."""
        return "Optimizer." in self.reason or "/torch/optim/" in self.location.replace("\\", "/")


@dataclass(frozen=True)
class Frame:
    """The Python frame whose graph Dynamo is compiling.

    Attributes:
        name: the user's function.
        arguments: its argument names in order, with the names of ``*args`` and ``**kwargs``.
        positional: its positional argument names, without ``self`` of a module.
        resumed: whether the frame continues the function after a graph break.
        values: the arguments' values, as far as the frame still has them.
        rebound: arguments that the function assigns to.
        earlier_breaks: the breaks before the point where the frame continues.
        end: the break that ends the graph, or None when the function returns.
    """

    name: str
    arguments: tuple[str, ...]
    positional: tuple[str, ...]
    resumed: bool
    values: Mapping[str, Any]
    rebound: frozenset[str]
    earlier_breaks: tuple[GraphBreak, ...]
    end: GraphBreak | None


def _is_method(code: CodeType, owner: Any) -> bool:
    """Whether code is that of a method of an object."""
    method = inspect.unwrap(getattr(type(owner), code.co_name, None) or _is_method)
    return getattr(method, "__code__", None) is code


def current_frame(gm: fx.GraphModule) -> Frame:
    """Describe the frame whose graph Dynamo hands to the backend."""
    from torch._dynamo.resume_execution import ContinueExecutionCache
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.utils import graph_break_reasons

    translator = InstructionTranslator.current_tx()
    code: CodeType = translator.f_code
    metadata = ContinueExecutionCache.generated_code_metadata.get(code)
    original = code if metadata is None else metadata.code
    arguments = _argument_names(original)
    positional = arguments[: original.co_argcount]
    if positional and _is_method(original, translator.f_locals.get(positional[0])):
        # vmap's in_dims count the arguments of a bound method, not the object itself.
        positional = positional[1:]
    earlier: tuple[GraphBreak, ...] = ()
    if metadata is not None:
        line = int(code.co_name.rsplit("_at_", 1)[-1]) if "_at_" in code.co_name else 10**9
        found = (_graph_break(reason) for reason in graph_break_reasons)
        earlier = tuple(
            broke
            for broke in dict.fromkeys(found)
            if not broke.file
            or ((broke.file, broke.function) == (original.co_filename, original.co_name)
            and broke.line <= line)
        )
    reason = getattr(gm, "compile_subgraph_reason", None)
    return Frame(
        name=original.co_name,
        arguments=arguments,
        positional=positional,
        resumed=metadata is not None,
        values={
            name: translator.f_locals[name] for name in arguments if name in translator.f_locals
        },
        rebound=frozenset(
            instruction.argval
            for instruction in dis.get_instructions(original)
            if instruction.opname in ("STORE_FAST", "STORE_DEREF")
        ),
        earlier_breaks=earlier,
        end=_graph_break(reason) if reason is not None and reason.graph_break else None,
    )


def in_optimizer() -> bool:
    """Return whether the frame being compiled is torch's own code of an optimizer."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    code: CodeType = InstructionTranslator.current_tx().f_code
    return os.path.dirname(code.co_filename) == os.path.dirname(torch.optim.__file__)


def uncompiled_caller() -> str | None:
    """Describe the caller of the frame being compiled that itself runs uncompiled, if any.

    Where Dynamo leaves a function alone (a loop or ``try`` around a graph break), it compiles the
    functions that this one calls, each by itself.
    """
    from torch._dynamo.convert_frame import output_codes

    machinery = inspect.getfile(torch._dynamo.convert_frame)
    callers: list[tuple[CodeType, int]] = []
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        callers.append((frame.f_code, frame.f_lineno))
        if frame.f_code.co_filename == machinery:
            callers.clear()
        frame = frame.f_back
    for code, line in callers:
        if code not in output_codes and not code.co_filename.endswith(_PASSING_ON):
            return f"{code.co_name} ({code.co_filename}:{line})"
    return None


# What stands between the call of a compiled function and its frame: it only passes arguments on.
_PASSING_ON = tuple(
    os.path.join("torch", *parts)
    for parts in (
        ("nn", "modules", "module.py"),
        ("utils", "_contextlib.py"),
        ("_dynamo", "external_utils.py"),
        ("_dynamo", "eval_frame.py"),
    )
)


def last_unexpected_break() -> GraphBreak | None:
    """Return Dynamo's last graph break that is neither at backward() nor in an optimizer."""
    from torch._dynamo.utils import graph_break_reasons

    for reason in reversed(graph_break_reasons):
        broke = _graph_break(reason)
        if not (broke.is_backward or broke.is_optimizer):
            return broke
    return None


def _argument_names(code: CodeType) -> tuple[str, ...]:
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)
    return code.co_varnames[:count]


def _graph_break(reason: Any) -> GraphBreak:
    # user_stack[0] is the frame that Dynamo compiles; the last entry is the line that broke it.
    stack = reason.user_stack
    if not stack:
        return GraphBreak(reason.reason, "an unknown line", "", 0, "")
    outer, inner = stack[0], stack[-1]
    return GraphBreak(
        reason=reason.reason,
        location=f"{inner.filename}:{inner.lineno}, code: {inner.line}",
        file=outer.filename,
        line=outer.lineno or 0,
        function=outer.name,
    )


def active_ddp_module() -> Any | None:
    """Return the DistributedDataParallel module whose forward runs, if any."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module()
