"""What a graph without gradients leaves behind: nothing that depends on samples."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import fx

from flashnorm_compile._torch import descriptors, is_in_place, source_location
from flashnorm_compile.errors import PrivacyError

aten = torch.ops.aten


@dataclass(frozen=True)
class StateWrites:
    """Refuses to write what is computed from samples into state, such as parameters and buffers.

    Attributes:
        samples: positions of the inputs that may hold samples, or what was computed from them.
        state: positions of the inputs that must hold nothing of the kind afterwards: those that
            are no samples, and what a module holds.
        names: input position → the user's name.
    """

    samples: Set[int]
    state: Set[int]
    names: Mapping[int, str]

    def __call__(self, graph: fx.Graph) -> None:
        """Check AOTAutograd's graph: writes into inputs are copies at its end, or outputs.

        Raises:
            PrivacyError: state would hold data without noise.
        """
        placeholders = graph.find_nodes(op="placeholder")
        inputs = {node: _position(node.meta.get("desc")) for node in placeholders}
        tainted = {
            node for node, index in inputs.items() if index is None or index in self.samples
        }
        for node in graph.nodes:
            if not any(arg in tainted for arg in node.all_input_nodes):
                continue
            tainted.add(node)
            if is_in_place(node):
                target, written = (*node.args, None, None)[:2]
                index = inputs.get(target)  # type: ignore[arg-type]
                into_samples = target in tainted and index not in self.state
                if not (node.target is aten.copy_.default and into_samples):
                    self._refuse(written, index)
        output = graph.output_node()
        for value, descriptor in zip(output.args[0], output.meta["desc"], strict=True):  # type: ignore[arg-type]
            match descriptor:
                case descriptors.InputMutationAOTOutput(mutated_input=written_to):
                    index = _position(written_to)
                    if value in tainted and (index is None or index in self.state):
                        self._refuse(value, index)

    def _refuse(self, written: object, index: int | None) -> None:
        location = source_location(written) if isinstance(written, fx.Node) else ""
        name = "a tensor" if index is None else self.names.get(index, f"input {index}")
        raise PrivacyError(
            f"The step writes a value that depends on samples into {name}; it would carry data "
            f"out without noise ({location}). Take it from .grad or the parameters, which are "
            "private, or do it in a step of its own that spends privacy."
        )


def _position(descriptor: object) -> int | None:
    match descriptor:
        case descriptors.PlainAOTInput(idx=index):
            return int(index)
    return None
