"""The rewritten graphs of three tiny models, as text: a change of the rewrite shows as a diff.

``FLASHNORM_UPDATE_GOLDEN=1`` writes the files anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flashnorm_compile as fn

GOLDEN = Path(__file__).parent / "golden"
# The joint graph itself is torch's work, and its text changes with torch.
TORCH = "2.13"


class Tied(nn.Module):
    """A table that is both the first and the last layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 3)

    def forward(self, tokens):
        return F.linear(self.table(tokens), self.table.weight)


def square_loss(model, x):
    return model(x).square().mean()


def token_mean(model, tokens):
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), ignore_index=0)


CASES = {
    "linear_materialize": (lambda: nn.Linear(3, 2), lambda: torch.randn(4, 5, 3), square_loss),
    "linear_ghost": (lambda: nn.Linear(3, 2), lambda: torch.randn(4, 5, 3), square_loss),
    "tied_ghost": (Tied, lambda: torch.randint(11, (4, 5)), token_mean),
}


def readable(graph: str) -> str:
    """A graph's code without the comments about its origin."""
    lines = [line.split("  #")[0].rstrip() for line in graph.splitlines()]
    lines = [line for line in lines if line and not line.lstrip().startswith("#")]
    return "\n".join(re.sub(r";  [\w =]+ = None$", "", line) for line in lines) + "\n"


@pytest.mark.skipif(not torch.__version__.startswith(TORCH), reason=f"written with torch {TORCH}")
@pytest.mark.parametrize("name", CASES)
def test_rewritten_graph(name):
    make, data, loss_of = CASES[name]

    @fn.dp_step(
        max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4,
        strategy=name.split("_")[1], lowering="eager",
    )
    def step(model, batch):
        loss_of(model, batch).backward()

    step(make(), data())
    (graph,) = step.graphs
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("FLASHNORM_UPDATE_GOLDEN"):
        path.write_text(readable(graph))
    assert readable(graph) == path.read_text()
