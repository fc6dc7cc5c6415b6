"""What each input of a captured graph is: parameter, buffer, batch input or constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import fx

from flashnorm_compile._torch import (
    Frame,
    InputSource,
    example_argument,
    hint,
    input_source,
    size_expr,
)
from flashnorm_compile.aliases import leaves, refuse_shared_memory
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.in_dims import (
    declaration,
    dims_by_name,
    follow,
    names_attribute,
    refuse_unknown_names,
)


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

    @property
    def is_constant(self) -> bool:
        """Whether the input is no batch input, and is not trained either."""
        return self.role is not Role.BATCH and not self.requires_grad


@dataclass(frozen=True)
class Roles:
    """The inputs of a graph and the size of its batch."""

    inputs: tuple[Input, ...]
    batch_size: int | torch.SymInt

    @property
    def batch_input(self) -> Input:
        """The first batch input: the actual batch size is read off it."""
        return next(each for each in self.inputs if each.role is Role.BATCH)

    def positions(self) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """Return names and positions of the batch inputs, and of what counts as a constant."""
        samples = [(each.name, each.index) for each in self.inputs if each.role is Role.BATCH]
        constants = [(each.name, each.index) for each in self.inputs if each.is_constant]
        return samples, constants


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
    sources = [source for node in placeholders if (source := input_source(node)) is not None]
    refuse_unknown_names(dims_by_name(in_dims, frame), [each.root for each in sources], frame)
    refuse_shared_memory(
        [(name, tensor) for name, tensor, _ in arguments_with_samples(frame, in_dims)],
        [
            (each.name, example_argument(placeholders[each.index]))
            for each in inputs
            if each.is_constant
        ],
    )
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
    sizes |= _sizes_of_unused_inputs(placeholders, frame, in_dims)
    first, batch_size = next(iter(sizes.items()))
    for name, size in sizes.items():
        # Two symbols become one here, by a guard: other sizes compile another graph.
        if size_expr(size) != size_expr(batch_size) and not bool(size == batch_size):
            declared = {
                user_name(source): declaration(source)
                for node in placeholders
                if (source := input_source(node)) is not None
            }
            raise PrivacyError(
                f"The batch inputs disagree on the batch size: {first} has {hint(batch_size)} "
                f"samples, {name} has {hint(size)}. If one of them is no batch input, say so of "
                f"that one alone: {declared[first]} if {first} holds no samples, "
                f"{declared[name]} if {name} holds none."
            )
    return Roles(inputs, batch_size)


def _assign(index: int, node: fx.Node, frame: Frame, in_dims: Any) -> Input:
    example = node.meta["example_value"]
    source = input_source(node)
    if isinstance(example, (Number, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return Input(index, node.name, Role.CONSTANT)
    if source is None or not isinstance(example, torch.Tensor):
        raise PrivacyError(
            f"The graph of {frame.name} has an input, {node.name}, of which it is not known "
            f"whether it holds samples ({type(example).__name__}). Pass tensors as arguments of "
            "the compiled function."
        )
    if source.is_number:
        return Input(index, node.name, Role.CONSTANT)
    name = user_name(source)
    requires_grad = example.requires_grad
    if source.is_registered:
        role = Role.PARAMETER if requires_grad else Role.BUFFER
        return Input(index, name, role, requires_grad)
    if isinstance(example, torch.nn.Parameter) and requires_grad:
        return Input(index, name, Role.PARAMETER, requires_grad)
    dim = _batch_dim(source, frame, in_dims, name, example)
    if dim is None:
        role = Role.PARAMETER if requires_grad else Role.CONSTANT
        return Input(index, name, role, requires_grad)
    if requires_grad:
        raise PrivacyError(
            f"{name} is a batch input that requires a gradient: its gradient would reach "
            f"{name}.grad sample by sample, unclipped. Pass {name}.detach(), or "
            f"{declaration(source)} if it is a parameter."
        )
    return Input(index, name, Role.BATCH, batch_dim=dim)


def may_hold_samples(placeholder: fx.Node, frame: Frame, in_dims: Any) -> bool:
    """Return whether an input of a graph that trains nothing may hold samples."""
    example, source = placeholder.meta["example_value"], input_source(placeholder)
    if not isinstance(example, torch.Tensor):
        return False
    if source is None:
        return True
    if source.is_number or source.is_registered or source.is_gradient:
        return False
    if isinstance(example, torch.nn.Parameter) and example.requires_grad:
        return False
    try:
        return _batch_dim(source, frame, in_dims, user_name(source), example) is not None
    except PrivacyError:
        return True


def _batch_dim(
    source: InputSource, frame: Frame, in_dims: Any, name: str, example: torch.Tensor
) -> int | None:
    named = dims_by_name(in_dims, frame)
    if source.in_module and not names_attribute(named, source):
        raise PrivacyError(_not_registered(source, name))
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
    dim = follow(spec, source.path, name)
    if dim is None:
        return None
    if not -example.ndim <= dim < example.ndim:
        raise PrivacyError(
            f"{name} has {example.ndim} dims and no dim {dim} for the batch. If it is the same "
            f"for all samples, whatever they are, say so with {declaration(source)}."
        )
    return dim % example.ndim


def arguments_with_samples(
    frame: Frame, in_dims: Any, *, arrays: bool = True
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Find the tensors among the arguments that hold samples, used in the graph or not.

    Yields name, tensor and batch dim.

    Dynamo makes one input of a tensor that it meets twice, under the name it met first.
    """
    named = dims_by_name(in_dims, frame)
    for root, value in frame.values.items():
        spec = named.get(root, 0) if isinstance(named, Mapping) else named
        for path, tensor in leaves(value, arrays=arrays):
            name = root + "".join(f"[{key!r}]" for key in path)
            dim = follow(spec, path, name)
            if not tensor.requires_grad and dim is not None:
                yield name, tensor, dim


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


def _sizes_of_unused_inputs(
    placeholders: list[fx.Node], frame: Frame, in_dims: Any
) -> dict[str, torch.SymInt]:
    """Find batch sizes that are read off arguments which the graph does not use otherwise."""
    named, found = dims_by_name(in_dims, frame), {}
    for node in placeholders:
        example, source = node.meta["example_value"], input_source(node)
        if not isinstance(example, torch.SymInt) or source is None or source.size_of is None:
            continue
        if source.root not in frame.arguments or source.in_module:
            continue
        name = user_name(source)
        spec = named.get(source.root, 0) if isinstance(named, Mapping) else named
        dim = follow(spec, source.path, name)
        # Of how many dims a negative one counts is not known here.
        if dim is not None and (dim == source.size_of or dim < 0):
            found[name] = example
    return found


def _not_registered(source: InputSource, name: str) -> str:
    below_module = source.path[source.module_depth or 0 :]
    attribute = below_module[0] if below_module else name
    return (
        f"{name} is a tensor that the module holds as a plain attribute, so it is not known "
        f"whether it holds samples. If it holds none, register it where it is made, "
        f"self.register_buffer({attribute!r}, tensor, persistent=False), or say so with "
        f"{declaration(source)}; pass samples as an argument."
    )


def _not_an_argument(source: InputSource, frame: Frame, name: str) -> str:
    remedy = (
        f"Pass it as an argument, or say what it is with {declaration(source)} "
        "(the same for every sample, whatever they are) or the dim of its batch axis."
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


def user_name(source: InputSource) -> str:
    """Write a source as the user would: L['model']._modules['fc']._parameters['weight']."""
    text = source.expression
    # By way of ``__dict__`` where a module has a ``__getattr__`` of its own.
    for container in ("_modules", "_parameters", "_buffers"):
        text = text.replace(f".__dict__['{container}']", "").replace(f".{container}", "")
    root = source.root or ""
    text = text.removeprefix(f"L[{root!r}]").removeprefix(f"G[{root!r}]")
    if source.in_module:
        text = text.replace("['", ".").replace("']", "")
    name = f"{root}{text}"
    return name.removeprefix("self.")
