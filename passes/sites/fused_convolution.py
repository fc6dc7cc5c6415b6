"""Convolution weights in two dimensions, by kernels of this package: no patches in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from flashnorm_compile.kernels.convolution import (
    convolution_norm,
    convolution_samples,
    convolution_weighted,
)
from flashnorm_compile.kernels.device import has_fast_kernels
from flashnorm_compile.passes.cost import Cost
from flashnorm_compile.passes.sites.base import Context
from flashnorm_compile.passes.sites.convolution import ConvolutionSite
from flashnorm_compile.passes.sites.rounding import HALF, Rounding, squares_above

# On a GPU. A kernel multiplies this many channels of a group at once; of fewer, most is idle.
MIN_CHANNELS = 16


class FusedConvolutionSite(ConvolutionSite):
    """The weight's output of a 2-d ``convolution_backward``."""

    kind: ClassVar[str] = "convolution"
    fused: ClassVar[bool] = True

    @classmethod
    def match(cls, node: fx.Node, context: Context) -> FusedConvolutionSite | None:
        """Recognise the site where kernels are asked for, and fast."""
        if ConvolutionSite.match(node, context) is None:
            return None
        site = cls(node, context)
        value, weight = site.gradient.meta["val"], site.weight.meta["val"]
        # The kernels take less of the GPU's time, and their launches more of the host's.
        fast = value.dtype in HALF and has_fast_kernels(value.device)
        if not context.wants_kernels(faster=context.graphs and fast):
            return None
        depthwise = site.groups > 1 and weight.shape[0] // site.groups < MIN_CHANNELS
        suits = weight.ndim == 4 and value.dtype != torch.float64
        return site if suits and not (value.is_cuda and depthwise) else None

    def measured(self) -> tuple[fx.Node, fx.Node]:
        """Emit [B, *weight shape] and the norms of what is stored."""
        geometry = self._geometry()

        def samples(
            outer: torch.Tensor, inner: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return convolution_samples(outer, inner, *geometry, outer.dtype)  # type: ignore[no-any-return]

        return self._emit(self._ordered(samples))  # type: ignore[no-any-return]

    def per_sample(self) -> fx.Node:
        """Emit [B, *weight shape]."""
        return self.measured()[0]

    def weighted(self, weights: fx.Node, before: fx.Node) -> fx.Node:
        """Emit Σ_i c_i g_i, weighed after each sample's product."""
        geometry, transposed = self._geometry(), self.transposed

        def code(
            weights: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor
        ) -> torch.Tensor:
            outer, inner = (x, gradient) if transposed else (gradient, x)
            return convolution_weighted(outer, inner, weights, *geometry)

        return self.context.emit(
            code, weights, self.gradient, self.input, before=before, like=self.node
        )

    @property
    def rounding(self) -> Rounding:
        """The rounding of ``weighted``: operands enter it as they are."""
        return Rounding.of_exact_products(self.gradient.meta["val"])

    def flash(self) -> tuple[fx.Node, fx.Node]:
        """Emit squared norms of gradients of which only tiles are ever there.

        The slack takes the spread to be what it can be at most, ‖G_i‖‖P_i‖; an element of the
        input is in at most as many patches as the kernel has elements.
        """
        geometry, rounding, size = self._geometry(), self.rounding, math.prod(self.kernel)

        def norm(outer: torch.Tensor, inner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            spread = 2 * (size * squares_above(outer) * squares_above(inner)).sqrt()
            slack = rounding.spread_slack(spread, outer.shape[2] * outer.shape[3])
            return convolution_norm(outer, inner, *geometry), slack

        return self._emit(self._ordered(norm))  # type: ignore[no-any-return]

    def materialize_cost(self) -> Cost:
        """Each sample's gradient is written, and read once."""
        batch, positions, outer, inner = self._sizes()
        device, value = self.context.device, self.gradient.meta["val"]
        size = value.element_size() * batch * self.groups
        flops = 2.0 * batch * self.groups * positions * outer * inner
        result, operands = size * outer * inner, size * positions * (outer + self._input_rows())
        apart = device.multiply(flops, value.dtype, operands + result)
        together = device.multiply(flops, value.dtype, operands)
        read = device.move(result)
        return Cost(
            seconds=apart.seconds - together.seconds + read.seconds,
            bytes=result + read.bytes,
            kept=result,
        )

    def flash_cost(self) -> Cost:
        """Each sample's gradient once more, norms of the operands, and both of them kept."""
        batch, positions, outer, inner = self._sizes()
        device, value = self.context.device, self.gradient.meta["val"]
        size = value.element_size() * batch * self.groups
        kept = size * positions * (outer + self._input_rows())
        flops = 2.0 * batch * self.groups * positions * outer * inner
        return device.multiply(flops, value.dtype, kept) + device.move(kept) + Cost(kept=kept)

    def _input_rows(self) -> float:
        """Elements of the input, per group and position of the output."""
        return self._sizes()[3] / math.prod(self.kernel) * math.prod(self.stride)

    def _geometry(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        return self.kernel, self.stride, self.padding, self.dilation, self.groups

    def _ordered(self, code: Callable[..., Any]) -> Callable[..., Any]:
        """Exchange the operands of a transposed convolution."""
        transposed = self.transposed

        def ordered(gradient: torch.Tensor, x: torch.Tensor) -> Any:
            return code(x, gradient) if transposed else code(gradient, x)

        return ordered
