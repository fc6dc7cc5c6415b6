"""A read-only view of AOTAutograd's joint graph: which node is which input, output, gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from flashnorm_compile._torch import (
    descriptors,
    is_in_place,
    shape_exprs,
    size_expr,
    source_location,
)
from flashnorm_compile.errors import PrivacyError


@dataclass(frozen=True)
class JointGraph:
    """The joint forward and backward graph.

    Attributes:
        graph: the FX graph.
        inputs: placeholder by position of the input in Dynamo's graph.
        tangents: placeholder of each output's incoming gradient → that forward output.
        outputs: the user's forward outputs.
        state_writes: input position → the value the step writes into that input.
        gradients: input position → its gradient's position among the graph's outputs.
        tokens: placeholders without content, which keep side effects of the forward in order.
    """

    graph: fx.Graph
    inputs: dict[int, fx.Node]
    tangents: dict[fx.Node, fx.Node]
    outputs: tuple[fx.Node, ...]
    state_writes: dict[int, fx.Node]
    gradients: dict[int, int]
    tokens: tuple[fx.Node, ...]

    @property
    def output_node(self) -> fx.Node:
        """The graph's output node."""
        return self.graph.output_node()

    def gradient(self, index: int) -> fx.Node:
        """The node of the gradient of input ``index``."""
        return self.output_values[self.gradients[index]]

    @property
    def output_values(self) -> list[fx.Node]:
        """All values that the graph returns."""
        return list(self.output_node.args[0])  # type: ignore[arg-type]

    def replace_gradient(self, index: int, node: fx.Node) -> None:
        """Return ``node`` as the gradient of input ``index``."""
        values = self.output_values
        values[self.gradients[index]] = node
        container = self.output_node.args[0]
        self.output_node.args = (tuple(values) if isinstance(container, tuple) else values,)


def read_joint_graph(graph: fx.Graph) -> JointGraph | None:
    """Read AOTAutograd's descriptors; None for a graph without a backward.

    Raises:
        PrivacyError: an input or output is of a kind that is not understood (a tensor subclass,
            inputs that alias each other).
    """
    placeholders = graph.find_nodes(op="placeholder")
    inputs: dict[int, fx.Node] = {}
    tangent_of: dict[fx.Node, object] = {}
    tokens: list[fx.Node] = []
    for node in placeholders:
        match node.meta.get("desc"):
            case descriptors.PlainAOTInput(idx=index):
                inputs[index] = node
            case descriptors.TangentAOTInput(output=output):
                tangent_of[node] = output
            case descriptors.ForwardTokenAOTInput():
                tokens.append(node)
            case other if tangent_of or _has_tangents(placeholders):
                raise PrivacyError(
                    f"The step has an input that is not understood ({other}): inputs that share "
                    "memory, tensor subclasses and side effects in the backward are not "
                    "supported. Pass separate plain tensors."
                )
    if not tangent_of:
        return None
    values = list(graph.output_node().args[0])  # type: ignore[arg-type]
    by_descriptor: dict[object, fx.Node] = {}
    outputs: list[fx.Node] = []
    writes: dict[int, fx.Node] = {}
    gradients: dict[int, int] = {}
    for position, (value, descriptor) in enumerate(
        zip(values, graph.output_node().meta["desc"], strict=True)
    ):
        match descriptor:
            case descriptors.GradAOTOutput(grad_of=descriptors.PlainAOTInput(idx=index)):
                if value is not None:
                    gradients[index] = position
            case descriptors.InputMutationAOTOutput(
                mutated_input=descriptors.PlainAOTInput(idx=index)
            ):
                writes[index] = value
                by_descriptor[descriptor] = value
            case descriptors.PlainAOTOutput() | descriptors.IntermediateBaseAOTOutput():
                by_descriptor[descriptor] = value
                if isinstance(value, fx.Node):
                    outputs.append(value)
            case None | descriptors.ForwardTokenAOTOutput():
                pass
            case other:
                raise PrivacyError(
                    f"The step has an output that is not understood ({other}); tensor subclasses "
                    "are not supported."
                )
    writes |= _kept_writes(graph, {node: index for index, node in inputs.items()})
    tangents = {}
    for node, source in tangent_of.items():
        if source not in by_descriptor:
            raise PrivacyError(f"The gradient of the output {source} enters the step unexplained.")
        tangents[node] = by_descriptor[source]
    return JointGraph(graph, inputs, tangents, tuple(outputs), writes, gradients, tuple(tokens))


def _kept_writes(graph: fx.Graph, inputs: dict[fx.Node, int]) -> dict[int, fx.Node]:
    """Find the writes into inputs that AOTAutograd keeps in the graph, as copies.

    Raises:
        PrivacyError: something else than a whole input is written in place.
    """
    writes = {}
    for node in graph.nodes:
        if not is_in_place(node):
            continue
        target, value = (*node.args, None, None)[:2]
        whole = node.target is torch.ops.aten.copy_.default and target in inputs
        if not whole or not isinstance(value, fx.Node) or inputs[target] in writes:
            raise PrivacyError(
                f"The step writes in place in a way that is not understood ({node.target}, at "
                f"{source_location(node)}). Use the function that returns a new tensor."
            )
        writes[inputs[target]] = value
    return writes


def _has_tangents(placeholders: list[fx.Node]) -> bool:
    return any(
        isinstance(node.meta.get("desc"), descriptors.TangentAOTInput) for node in placeholders
    )


def no_loss(tangents: list[fx.Node], batch_size: int | torch.SymInt) -> str:
    """Say that a function returns nothing that a backward may start from."""
    batch = size_expr(batch_size)
    shapes = [
        f"[{', '.join('B' if size == batch else str(size) for size in shape)}]"
        for shape in (shape_exprs(tangent.meta["val"].shape) for tangent in tangents)
    ]
    return (
        f"The compiled function returns no loss, only outputs of shape {', '.join(shapes)}: what "
        "a loss outside does with the samples is not seen. Compile the loss too; or promise, with "
        "the option loss_outside=True, that it is computed for each sample by itself and then "
        "reduced as loss_reduction says."
    )
