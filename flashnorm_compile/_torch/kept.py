"""What Dynamo knows a frame to keep: tensors in attributes and containers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd import descriptors
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor

from flashnorm_compile._torch.inputs import _REGISTRIES, InputSource, describe_source, source_name


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that a frame puts into an object that was there before it.

    Attributes:
        owner: where that object comes from.
        key: the attribute or key it is put under, as code (".last", "['z']"), or "".
        node: the tensor in the graph, or None if the frame only passes it on.
    """

    owner: InputSource
    key: str
    node: fx.Node | None


def kept_tensors(gm: fx.GraphModule) -> list[KeptTensor]:
    """Return the tensors that the frame puts into objects that outlive it."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    effects: Any = InstructionTranslator.current_tx().output.side_effects
    nodes = {node.name: node for node in gm.graph.nodes}
    found = []
    for variable in effects.id_to_variable.values():
        is_new = type(variable.mutation_type).__name__.endswith("New")
        if is_new or variable.source is None or not effects.is_modified(variable):
            continue
        owner = describe_source(variable.source, as_tensor=False)
        for key, value in _contents(variable, effects):
            for node, source in _tensors_in(value, effects):
                if source is not None and _comes_from(source, variable.source):
                    continue
                if node is None or node.name in nodes:
                    kept = None if node is None else nodes[node.name]
                    found.append(KeptTensor(owner, key, kept))
    return found


def _contents(variable: Any, effects: Any) -> Iterator[tuple[str, Any]]:
    for name, value in effects.store_attr_mutations.get(variable, {}).items():
        # A cell holds what a variable of an enclosing function refers to.
        yield ("" if name == "cell_contents" else f".{name}"), value
    items = getattr(variable, "items", None)
    if not isinstance(items, dict):
        yield "", variable
        return
    name = source_name(variable.source)
    for key, value in items.items():
        text = ""
        if key.vt.is_python_constant():
            constant = key.vt.as_python_constant()
            text = f".{constant}" if name.endswith(_REGISTRIES) else f"[{constant!r}]"
        yield text, value
        yield text, key.vt  # an item of a set is its key


def _tensors_in(value: Any, effects: Any) -> list[tuple[fx.Node | None, Any]]:
    """Return the tensors inside one of Dynamo's values: (graph node, source)."""
    from torch._dynamo.variables.base import VariableTracker
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    found: list[tuple[fx.Node | None, Any]] = []
    seen: dict[int, Any] = {}

    def look(variable: Any) -> None:
        if not _is_read(variable):
            # Looking into it would make it a graph input.
            if _holds_samples(variable.original_value(), variable.original_source()):
                found.append((None, variable.original_source()))
            return
        node = getattr(getattr(variable, "proxy", None), "node", None)
        if isinstance(node, fx.Node):
            example = node.meta.get("example_value")
            source = getattr(node, "_dynamo_source", None)
            # A number that the graph computes from data has a symbol without a size behind it.
            if isinstance(example, torch.Tensor) or free_unbacked_symbols(example):
                found.append((node, source if node.op == "placeholder" else None))
        for each in effects.store_attr_mutations.get(variable, {}).values():
            VariableTracker.visit(look, each, seen)

    VariableTracker.visit(look, value, seen)
    return found


def _holds_samples(value: Any, source: Any) -> bool:
    """Whether a value that the frame passes on unread may hold samples."""
    if source is not None and describe_source(source, as_tensor=False).in_module:
        return False
    if isinstance(value, torch.Tensor):
        return not value.requires_grad
    if isinstance(value, Mapping):
        return any(_holds_samples(each, None) for each in value.values())
    return isinstance(value, (list, tuple)) and any(_holds_samples(each, None) for each in value)


def _comes_from(source: Any, owner: Any) -> bool:
    link = source
    while link is not None:
        if link == owner:
            return True
        link = getattr(link, "base", None)
    return False


def changed_inputs(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the placeholders whose tensors a graph changes in place."""
    from torch._functorch._aot_autograd import collect_metadata_analysis as analysis

    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = [node.meta["example_value"] for node in placeholders]
    modes = [each.fake_mode for each in examples if isinstance(each, FakeTensor)]
    if not modes:
        return []
    collect = analysis.run_functionalized_fw_and_collect_metadata(
        gm.forward,
        flat_args_descs=[descriptors.PlainAOTInput(index) for index in range(len(examples))],
        keep_input_mutations=True,
    )
    # The examples are Dynamo's; the tracing context already has a fake mode for the compiler.
    with tracing(None), modes[0]:
        info = collect(*examples).input_info
    return [
        node
        for node, each in zip(placeholders, info, strict=True)
        if each.mutates_data or each.mutates_metadata or each.mutates_storage_metadata
    ]


def _is_read(variable: Any) -> bool:
    """Whether Dynamo has read a value; looking into one it has not makes it a graph input."""
    return not hasattr(type(variable), "is_realized") or variable.is_realized()
