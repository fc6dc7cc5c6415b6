"""Where Dynamo found the inputs of its graph, and how their sizes are seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class InputSource:
    """Where Dynamo found a graph input.

    Attributes:
        expression: Dynamo's name for it, such as ``L['batch']['x']``.
        root: the local or global variable it is reached from.
        path: keys, indices and attribute names from the root, as the user writes them: without
            the dicts in which a module keeps its parameters, buffers and submodules.
        module_depth: how much of the path leads to the last ``nn.Module`` on it, or None.
        is_registered: whether it is a parameter or buffer registered in that module.
        is_gradient: whether it is the ``.grad`` of a tensor.
        is_number: whether it is a Python number that Dynamo passes as a tensor.
        size_of: the dim of which it is the size, for a size of a tensor, which the path leads to.
    """

    expression: str
    root: str | None
    path: tuple[Any, ...]
    module_depth: int | None
    is_registered: bool
    is_gradient: bool
    is_number: bool
    size_of: int | None

    @property
    def in_module(self) -> bool:
        """Whether the path goes through an ``nn.Module``."""
        return self.module_depth is not None


def input_source(placeholder: fx.Node) -> InputSource | None:
    """Describe the source of a placeholder of Dynamo's graph; None when it has none."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    grapharg = placeholder.meta.get("grapharg")
    as_tensor = bool(grapharg is not None and grapharg.pass_arg_as_tensor)
    return describe_source(source, as_tensor)


def source_name(source: Any) -> str:
    try:
        return str(source.name() if callable(source.name) else source.name)
    except NotImplementedError:  # the cell of a variable that an inner function assigns
        return ""


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def describe_source(source: Any, as_tensor: bool) -> InputSource:
    chain: list[Any] = []
    link = source
    while link is not None:
        chain.insert(0, link)
        link = getattr(link, "base", None)
    kinds = [type(link).__name__ for link in chain]
    path: list[Any] = []
    module_depth = None
    for kind, link in zip(kinds[1:], chain[1:], strict=True):
        keys = (
            getattr(link, each) for each in ("index", "member", "idx_key") if hasattr(link, each)
        )
        path += [key for key in keys if key not in _REGISTRIES]
        if "Module" in kind or "ParamBuffer" in kind:
            module_depth = len(path)
    # A parameter's gradient is found as an attribute, another tensor's by a source of its own.
    of_parameter = getattr(source, "member", None) == "grad" and _is_registered(kinds[:-1])
    # An array is an input as a tensor too, under a source that converts it.
    is_array = kinds[-1] == "NumpyTensorSource"
    is_property = kinds[-1] == "TensorPropertySource"
    named = chain[-2] if is_array or is_property else source
    return InputSource(
        expression=source_name(named),
        root=getattr(chain[0], "local_name", None) or getattr(chain[0], "global_name", None),
        path=tuple(path),
        module_depth=module_depth,
        is_registered=_is_registered(kinds),
        is_gradient=of_parameter or "GradSource" in kinds,
        is_number=as_tensor and "NumpyTensorSource" not in kinds,
        size_of=source.idx if is_property and source.prop.name == "SIZE" else None,
    )


def _is_registered(kinds: list[str]) -> bool:
    """Whether the last links of a source are a module's registry, and one key into it."""
    return kinds[-2:-1] == ["UnspecializedParamBufferSource"] and "GetItem" in kinds[-1]


def example_argument(placeholder: fx.Node) -> Any:
    """Return the value with which Dynamo was called for a placeholder, or None if it is gone."""
    held = getattr(placeholder.meta.get("grapharg"), "_example", None)
    return held() if callable(held) else held


def stored_tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors that hold a tensor's memory: itself, or what a subclass wraps."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return []
    if is_traceable_wrapper_subclass(value):
        inner, _ = value.__tensor_flatten__()
        return [each for name in inner for each in stored_tensors(getattr(value, name))]
    return [value] if value.layout is torch.strided else []


# Before torch 2.13 the only mark without an error for a dim that turns out to be fixed; guards
# look at it, at the new one they do not.
_MARKS = "_dynamo_propagated_dynamic_indices"
_OLD_MARKS = "_dynamo_weak_dynamic_indices"


def mark_symbolic(placeholder: fx.Node, dim: int) -> bool:
    """Ask Dynamo for a symbol of its own for one size of a graph input.

    Returns:
        Whether that is news; if so, tracing must start again.
    """
    argument = placeholder.meta.get("grapharg")
    if argument is None or argument.pass_arg_as_tensor:
        # An array becomes another tensor in every trace; the mark would not be found there.
        return False
    value = argument.example
    return isinstance(value, torch.Tensor) and mark_size(value, dim)


def mark_size(tensor: torch.Tensor, dim: int) -> bool:
    """Ask Dynamo for a symbol for one size of a tensor; tell whether that is news."""
    old = torch.__version__.split(".")[:2] < ["2", "13"]
    name = _OLD_MARKS if old else _MARKS
    marked: set[int] = getattr(tensor, name, set())
    if dim in marked:
        return False
    setattr(tensor, name, {*marked, dim})
    return True


def trace_again(reason: str) -> NoReturn:
    """Make Dynamo trace the frame anew, from inside a backend."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    # What the first trace found out need not hold in the second, which sees symbols.
    InstructionTranslator.current_tx().speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)
