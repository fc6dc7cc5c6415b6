"""The interface of a gradient site: a node that contracts the batch axis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from flashnorm_compile.passes.batch_axis.analysis import Analysis
from flashnorm_compile.passes.batch_axis.values import Batched
from flashnorm_compile.passes.emit import Emitter
from flashnorm_compile.passes.sites.rounding import Rounding


@dataclass(frozen=True)
class Cost:
    """Predicted extra work of a strategy over the non-private step, per batch."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Context:
    """What a site needs to write its code.

    Attributes:
        emit: splices snippets into the graph.
        analysis: the batch-axis analysis.
        batch: a [B] node, from whose shape snippets read the batch size.
    """

    emit: Emitter
    analysis: Analysis
    batch: fx.Node


class Site(ABC):
    """A node whose result is a sum over samples of per-sample gradients."""

    kind: ClassVar[str]

    def __init__(self, node: fx.Node, context: Context) -> None:
        self.node = node
        self.context = context

    @abstractmethod
    def per_sample(self) -> fx.Node:
        """Emit the per-sample gradients [B, *shape of the node], in float32 or wider."""

    @abstractmethod
    def weighted(self, weights: fx.Node, before: fx.Node) -> fx.Node:
        """Emit Σ_i weights[i] · gradient_i in float32; samples of weight 0 are left out.

        Args:
            weights: [B] float32, zero for samples that must not contribute.
            before: where the code goes.
        """

    def ghost(self) -> tuple[fx.Node, fx.Node]:
        """Emit squared norms [B] without the gradients, and their slack (see ``rounding``)."""
        raise NotImplementedError(f"{self.kind} sites have no ghost norm")

    @property
    def rounding(self) -> Rounding:
        """The rounding of ``weighted``, where there is a ghost norm."""
        raise NotImplementedError(f"{self.kind} sites have no ghost norm")

    @property
    def defects(self) -> fx.Node | None:
        """[B] float32: infinite for samples to be left out that their norms may not show."""
        return None

    @property
    def axis_text(self) -> str:
        """Where the samples are in the operands, for people."""
        for operand in self.node.all_input_nodes:
            value = self.context.analysis.values.get(operand)
            if isinstance(value, Batched):
                shape = "×".join(str(size) for size in operand.meta["val"].shape)
                return f"dim {value.dim} of {shape}"
        return ""

    def inner_product_cost(self, other: Site) -> Cost | None:
        """Predict the cost of ``inner_product``; None if the other site is not known."""
        return None

    def inner_product(
        self, other: Site, transposed: bool, other_transposed: bool
    ) -> tuple[fx.Node, fx.Node]:
        """Emit ⟨gradient_i, other's gradient_i⟩ [B] without either, and its largest error.

        Args:
            other: a site of the same parameter.
            transposed: whether this site holds the transpose of the parameter's gradient.
            other_transposed: the same for the other site.
        """
        raise NotImplementedError(f"no inner product of {self.kind} and {other.kind}")

    def samples_product_cost(self) -> Cost | None:
        """Predict the cost of ``samples_product``; None if there is none."""
        return None

    def samples_product(self, samples: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Emit ⟨gradient_i, samples_i⟩ [B] without the gradient, and its largest error.

        Args:
            samples: per-sample gradients [B, *shape of the node] of another site.
        """
        raise NotImplementedError(f"no inner product of {self.kind} sites and given samples")

    @abstractmethod
    def materialize_cost(self) -> Cost:
        """Predict the cost of per-sample gradients."""

    def ghost_cost(self) -> Cost | None:
        """Predict the cost of norms without the gradients; None if unsupported."""
        return None


def numel(node: fx.Node) -> float:
    """Return a node's number of elements, with the traced example for symbolic sizes."""
    return float(hint(node.meta["val"].numel()))


def hint(size: int | torch.SymInt) -> int:
    """Return the size that was traced with."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint if size.node.hint is not None else 1)
    return int(size)


def later(first: fx.Node, second: fx.Node) -> fx.Node:
    """Return whichever node comes later in the graph."""
    return second if first < second else first
