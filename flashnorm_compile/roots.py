"""What a backward pass starts from: in a private step, from private graphs and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from flashnorm_compile.errors import PrivacyError

if TYPE_CHECKING:
    from flashnorm_compile.runtime import StepState

_PRIVATE = "flashnorm_private"


def mark_private_node(node: Any) -> None:
    """Mark an autograd node whose gradients are private."""
    node.metadata[_PRIVATE] = True


def refuse_raw_backward(roots: Sequence[torch.Tensor], state: StepState | None = None) -> None:
    """Refuse a backward pass that reaches a leaf other than through a private graph.

    Args:
        roots: what it starts from.
        state: of the step around it, if known: its gradients so far are discarded.

    Raises:
        PrivacyError: there is such a leaf. Nothing was computed.
    """
    pending: list[Any] = [root.grad_fn for root in roots]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node is None or _PRIVATE in node.metadata:
            continue
        if (leaf := getattr(node, "variable", None)) is not None:
            known = {} if state is None else state.parameters
            name = known.get(leaf, f"a tensor of shape {tuple(leaf.shape)}")
            for parameter in known:
                parameter.grad = None
            raise PrivacyError(
                f"backward() would compute a gradient of {name} that is not private: a part of "
                "the step ran without the compiler, since Dynamo skipped it (a function that is "
                "disabled for it, a loop or try block around a graph break, a compiler stance). "
                "It was not run. Keep the forward, the loss and backward() in plain "
                "sight of the compiled function; TORCH_LOGS=dynamo tells what was skipped."
            )
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                pending.append(following)


def reaches_leaves(result: Any) -> bool:
    """Whether a backward pass may start from what a step returns, other than a private graph's."""
    nodes: list[Any] = [
        x.grad_fn for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)
    ]
    return any(node is not None and _PRIVATE not in node.metadata for node in nodes)
