"""What a graph without gradients leaves behind: nothing that depends on samples."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import fx

from flashnorm_compile._torch import descriptors, source_location
from flashnorm_compile.errors import PrivacyError

aten = torch.ops.aten


@dataclass(frozen=True)
class StateWrites:
    """Refuses to write what is computed from samples into state, such as parameters and buffers.

    Attributes:
        samples: positions of the inputs that hold samples, or what was computed from them.
        names: input position → the user's name.
    """

    samples: Set[int]
    names: Mapping[int, str]

    def __call__(self, graph: fx.Graph) -> None:
        """Check AOTAutograd's graph; writes into inputs are copies at its end.

        Raises:
            PrivacyError: state would hold data without noise.
        """
        inputs: dict[fx.Node, int | None] = {}
        tainted: set[fx.Node] = set()
        for node in graph.find_nodes(op="placeholder"):
            match node.meta.get("desc"):
                case descriptors.PlainAOTInput(idx=index):
                    inputs[node] = index
                case _:
                    inputs[node] = None
            if inputs[node] is None or inputs[node] in self.samples:
                tainted.add(node)
        for node in graph.nodes:
            if not any(arg in tainted for arg in node.all_input_nodes):
                continue
            tainted.add(node)
            target = node.args[0] if node.args else None
            if node.target is aten.copy_.default and target in inputs and target not in tainted:
                self._refuse(node, inputs[target])  # type: ignore[index]

    def _refuse(self, node: fx.Node, index: int | None) -> None:
        written = node.args[1]
        location = source_location(written) if isinstance(written, fx.Node) else ""
        name = "a tensor" if index is None else self.names.get(index, f"input {index}")
        raise PrivacyError(
            f"The step writes a value that depends on samples into {name}; it would carry data "
            f"out without noise ({location}). Take it from .grad or the parameters, which are "
            "private, or do it in a step of its own that spends privacy."
        )
