"""The interface of a gradient site: a node that contracts the batch axis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from flashnorm_compile._torch import hint
from flashnorm_compile.passes.batch_axis.analysis import Analysis
from flashnorm_compile.passes.batch_axis.values import Batched
from flashnorm_compile.passes.cost import Cost, Device
from flashnorm_compile.passes.emit import Emitter
from flashnorm_compile.passes.sites.rounding import Rounding


@dataclass(frozen=True)
class Context:
    """What a site needs to write its code.

    Attributes:
        emit: splices snippets into the graph.
        analysis: the batch-axis analysis.
        batch: a [B] node, from whose shape snippets read the batch size.
        kernels: "library", "fused" (those of this package, where there is one) or "auto".
        graphs: whether kernels are replayed as CUDA graphs, so that to launch them takes no time.
    """

    emit: Emitter
    analysis: Analysis
    batch: fx.Node
    kernels: str = "library"
    graphs: bool = False

    def wants_kernels(self, *, faster: bool) -> bool:
        """Whether a site uses the kernels of this package, which are ``faster`` or are not."""
        return self.kernels == "fused" or (self.kernels == "auto" and faster)

    @property
    def device(self) -> Device:
        """The device that the step runs on."""
        return Device.of(self.batch.meta["val"].device)

    @property
    def batch_size(self) -> int:
        """B, as it was traced with."""
        return hint(self.batch.meta["val"].shape[0])


class Site(ABC):
    """A node whose result is a sum over samples of per-sample gradients."""

    kind: ClassVar[str]
    #: Whether norms and sums are made by kernels of this package.
    fused: ClassVar[bool] = False

    def __init__(self, node: fx.Node, context: Context) -> None:
        self.node = node
        self.context = context

    @abstractmethod
    def per_sample(self) -> fx.Node:
        """Emit the per-sample gradients [B, *shape of the node].

        Products of 16-bit operands are rounded to 16 bits: norms are those of the rounded values,
        which are what is summed.
        """

    @abstractmethod
    def weighted(self, weights: fx.Node, before: fx.Node) -> fx.Node:
        """Emit Σ_i weights[i] · gradient_i in float32; samples of weight 0 are left out.

        Args:
            weights: [B] float32, zero for samples that must not contribute.
            before: where the code goes.
        """

    def measured(self) -> tuple[fx.Node, fx.Node]:
        """Emit the per-sample gradients, and their squared norms [B]."""
        samples = self.per_sample()
        square = self.context.emit(square_norm, samples, before=samples.next, like=samples)
        return samples, square

    def ghost(self) -> tuple[fx.Node, fx.Node]:
        """Emit squared norms [B] from pairs of tokens, and their slack (see ``rounding``)."""
        raise NotImplementedError(f"{self.kind} sites have no ghost norm")

    def flash(self) -> tuple[fx.Node, fx.Node]:
        """Emit squared norms [B] of gradients that are never stored, and their slack."""
        raise NotImplementedError(f"{self.kind} sites have no flash norm")

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
        """Predict the cost of norms from pairs of tokens; None if unsupported."""
        return None

    def flash_cost(self) -> Cost | None:
        """Predict the cost of norms of gradients that are not stored; None if unsupported."""
        return None


def square_norm(samples: torch.Tensor) -> torch.Tensor:
    """Squared norms [B] of per-sample gradients [B, ...], in float32."""
    return samples.float().square().reshape(samples.shape[0], -1).sum(1)


def numel(node: fx.Node) -> float:
    """Return a node's number of elements, with the traced example for symbolic sizes."""
    return float(hint(node.meta["val"].numel()))


def later(first: fx.Node, second: fx.Node) -> fx.Node:
    """Return whichever node comes later in the graph."""
    return second if first < second else first
