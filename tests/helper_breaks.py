"""Functions of another file that break the graph: steps of the tests call them."""

from __future__ import annotations

import torch


def centre(x: torch.Tensor) -> None:
    """Change the batch in place, after a break."""
    torch._dynamo.graph_break()
    x.sub_(x.mean(0))
