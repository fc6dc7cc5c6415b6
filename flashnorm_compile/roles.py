"""What each input of a captured graph is: parameter, buffer, batch input or constant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from flashnorm_compile._torch import Frame, InputSource, input_source, size_expr
from flashnorm_compile.errors import PrivacyError


class Role(Enum):
    """The part that a graph input plays in a training step."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    BATCH = "batch input"
    CONSTANT = "constant"


@dataclass(frozen=True)
class Input:
    """One input of Dynamo's graph.

    Attributes:
        index: its position among the graph's inputs.
        name: the user's name for it ("model.fc.weight", "batch['x']").
        role: its part in the step.
        requires_grad: whether the step computes a gradient for it.
        batch_dim: the dim that holds the samples, for a batch input.
    """

    index: int
    name: str
    role: Role
    requires_grad: bool = False
    batch_dim: int | None = None


@dataclass(frozen=True)
class Roles:
    """The inputs of a graph and the size of its batch."""

    inputs: tuple[Input, ...]
    batch_size: int | torch.SymInt

    @property
    def batch_input(self) -> Input:
        """The first batch input: the actual batch size is read off it."""
        return next(each for each in self.inputs if each.role is Role.BATCH)


def assign_roles(graph: fx.Graph, frame: Frame, in_dims: Any) -> Roles:
    """Decide what every placeholder of Dynamo's graph is.

    Raises:
        PrivacyError: an input's part is unclear, no batch input is found, batch inputs disagree
            on the batch size, or a batch input requires a gradient.
    """
    inputs = tuple(
        _assign(index, node, frame, in_dims)
        for index, node in enumerate(graph.find_nodes(op="placeholder"))
    )
    placeholders = graph.find_nodes(op="placeholder")
    _refuse_unknown_names(dims_by_name(in_dims, frame), placeholders, frame)
    sizes = {
        each.name: placeholders[each.index].meta["example_value"].shape[each.batch_dim]
        for each in inputs
        if each.batch_dim is not None
    }
    if not sizes:
        raise PrivacyError(
            f"No batch input was found in {frame.name}: no argument of it is a tensor with a "
            "batch axis, so there are no samples to protect. Pass the batch as arguments of the "
            "compiled function, and name its axes with the option in_dims if they are not dim 0."
        )
    _unify_sizes([placeholders[each.index] for each in inputs if each.batch_dim is not None])
    first, batch_size = next(iter(sizes.items()))
    for name, size in sizes.items():
        # Two symbols become one here, by a guard: other sizes compile another graph.
        if size_expr(size) != size_expr(batch_size) and not bool(size == batch_size):
            raise PrivacyError(
                f"The batch inputs disagree on the batch size: {first} has {batch_size} samples, "
                f"{name} has {size}. If one of them is no batch input, say so with in_dims, for "
                f"example in_dims={{{name.split('[')[0].split('.')[0]!r}: None}}."
            )
    return Roles(inputs, batch_size)


def _assign(index: int, node: fx.Node, frame: Frame, in_dims: Any) -> Input:
    example = node.meta["example_value"]
    source = input_source(node)
    if not isinstance(example, torch.Tensor) or source is None or source.is_number:
        return Input(index, node.name, Role.CONSTANT)
    name = _user_name(source)
    requires_grad = example.requires_grad
    if isinstance(example, torch.nn.Parameter):
        return Input(index, name, Role.PARAMETER, requires_grad)
    if source.in_module:
        role = Role.PARAMETER if requires_grad else Role.BUFFER
        return Input(index, name, role, requires_grad)
    dim = _batch_dim(source, frame, in_dims, name, example)
    if dim is None:
        role = Role.PARAMETER if requires_grad else Role.CONSTANT
        return Input(index, name, role, requires_grad)
    if requires_grad:
        raise PrivacyError(
            f"{name} is a batch input that requires a gradient: its gradient would reach "
            f"{name}.grad sample by sample, unclipped. Pass {name}.detach(), or in_dims="
            f"{{{source.root!r}: None}} if it is a parameter."
        )
    return Input(index, name, Role.BATCH, batch_dim=dim)


def _batch_dim(
    source: InputSource, frame: Frame, in_dims: Any, name: str, example: torch.Tensor
) -> int | None:
    named = dims_by_name(in_dims, frame)
    if source.root is None or source.root not in frame.arguments:
        if isinstance(named, Mapping) and source.root in named:
            spec = named[source.root]
        else:
            raise PrivacyError(_not_an_argument(source, frame, name))
    else:
        if frame.resumed and source.root in frame.rebound:
            raise PrivacyError(
                f"{name} is assigned in {frame.name} before the graph break at "
                f"{_first_break(frame)}: what happened to it there was not seen. Do the work "
                "after the break, or give the result a call of its own."
            )
        spec = named.get(source.root, 0) if isinstance(named, Mapping) else named
    dim = _walk(spec, source.path, name)
    if dim is None:
        return None
    if not -example.ndim <= dim < example.ndim:
        raise PrivacyError(
            f"{name} has {example.ndim} dims and no dim {dim} for the batch. If it is the same "
            f"for all samples, say so with in_dims={{{source.root!r}: None}}."
        )
    return dim % example.ndim


def _unify_sizes(batch_inputs: list[fx.Node]) -> None:
    """Give sizes that vary, and agree in this call, one symbol where they have several.

    The analysis compares shapes as expressions. A call in which they differ fails the guard and
    compiles another graph.
    """
    shapes = [node.meta["example_value"].shape for node in batch_inputs]
    for i, shape in enumerate(shapes):
        for earlier in shapes[:i]:
            for size, other in zip(shape, earlier, strict=False):
                symbolic = isinstance(size, torch.SymInt) and isinstance(other, torch.SymInt)
                if symbolic and size_expr(size) != size_expr(other):
                    bool(size == other)


def _refuse_unknown_names(named: Any, placeholders: list[fx.Node], frame: Frame) -> None:
    if not isinstance(named, Mapping):
        return
    sources = [source for node in placeholders if (source := input_source(node)) is not None]
    known = {*frame.arguments, *(source.root for source in sources)}
    unknown = [name for name in named if name not in known]
    if unknown:
        raise PrivacyError(
            f"in_dims names {', '.join(map(repr, unknown))}, but {frame.name} has no such "
            f"argument; it has {', '.join(frame.arguments)}."
        )


def dims_by_name(in_dims: Any, frame: Frame) -> Any:
    """Turn in_dims given by position into a mapping from argument name to spec."""
    if in_dims is None:
        return 0
    if isinstance(in_dims, (tuple, list)):
        if len(in_dims) > len(frame.positional):
            raise PrivacyError(
                f"in_dims has {len(in_dims)} entries, but {frame.name} takes "
                f"{len(frame.positional)} positional arguments: {', '.join(frame.positional)}."
            )
        return dict(zip(frame.positional, in_dims, strict=False))
    return in_dims


def _walk(spec: Any, path: tuple[Any, ...], name: str) -> int | None:
    """Follow a path into nested in_dims; an int or None covers all that lies below it."""
    for key in path:
        if spec is None or isinstance(spec, int):
            break
        if isinstance(spec, Mapping):
            spec = spec.get(key, 0)
        elif isinstance(spec, (tuple, list)) and isinstance(key, int) and key < len(spec):
            spec = spec[key]
        else:
            raise PrivacyError(f"in_dims does not say where the batch axis of {name} is: {spec!r}.")
    if spec is None or (isinstance(spec, int) and not isinstance(spec, bool)):
        return spec
    raise PrivacyError(
        f"in_dims gives {spec!r} for {name}, which is a tensor; it takes an int or None."
    )


def _not_an_argument(source: InputSource, frame: Frame, name: str) -> str:
    remedy = (
        f"Pass it as an argument, or say what it is with in_dims={{{source.root or name!r}: None}} "
        "(the same for every sample) or the dim of its batch axis."
    )
    if source.is_gradient:
        return f"{name} is read in {frame.name}: gradients may not flow back into the loss."
    if frame.resumed:
        what = "A value" if name.startswith("___stack") else name
        return (
            f"{what} was computed in {frame.name} before the graph break at "
            f"{_first_break(frame)}; what happened to it there was not seen. Remove the break, or "
            "compute it outside and pass it as an argument."
        )
    return (
        f"{name} reaches {frame.name} from a closure or a global variable, so it is not known "
        f"whether it holds samples. {remedy}"
    )


def _first_break(frame: Frame) -> str:
    if not frame.earlier_breaks:
        return "an earlier line"
    broke = frame.earlier_breaks[-1]
    return f"{broke.location} ({broke.summary})"


def _user_name(source: InputSource) -> str:
    """Write a source as the user would: L['model']._modules['fc']._parameters['weight']."""
    text = source.expression
    for container in ("._modules", "._parameters", "._buffers"):
        text = text.replace(container, "")
    root = source.root or ""
    text = text.removeprefix(f"L[{root!r}]").removeprefix(f"G[{root!r}]")
    if source.in_module:
        text = text.replace("['", ".").replace("']", "")
    name = f"{root}{text}"
    return name.removeprefix("self.")
