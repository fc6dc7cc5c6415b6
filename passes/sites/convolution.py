"""Convolution weights, of any dimension, grouped, dilated or transposed.

With patches P_i [C/g·k, L] of the input and the output's gradient G_i [O/g, L] over L positions, a
sample's gradient is the matrix product G_i P_iᵀ, per group (Rochette et al. 2019, arXiv
1912.06015). A transposed convolution swaps the roles of input and gradient.
"""

from __future__ import annotations

import math
import operator
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn import functional

from flashnorm_compile._torch import hint
from flashnorm_compile.passes.batch_axis.values import Batched
from flashnorm_compile.passes.cost import Cost
from flashnorm_compile.passes.layout import SampleAxis, masked_scale
from flashnorm_compile.passes.sites.base import Context, Site
from flashnorm_compile.passes.sites.reduction import ReductionSite
from flashnorm_compile.passes.sites.rounding import Rounding, ghost_square, gram_dtype

aten = torch.ops.aten
_FIRST = SampleAxis(0, 1, 1)


class ConvolutionSite(Site):
    """The weight's output of ``convolution_backward``."""

    kind: ClassVar[str] = "convolution"

    def __init__(self, node: fx.Node, context: Context) -> None:
        super().__init__(node, context)
        call: Any = node.args[0]
        self.gradient, self.input, self.weight = call.args[:3]
        self.geometry = call.args[4:10]
        _, padding, dilation, self.transposed, _, self.groups = self.geometry
        dims = self.weight.meta["val"].ndim - 2
        # One number may stand for all dims.
        self.stride, self.padding, self.dilation = (
            list(given) * (dims // len(given)) for given in (self.geometry[0], padding, dilation)
        )
        self.kernel = [int(size) for size in self.weight.meta["val"].shape[2:]]

    @classmethod
    def match(cls, node: fx.Node, context: Context) -> ConvolutionSite | None:
        """Recognise the site."""
        call = _backward_call(node, 1)
        if call is None:
            return None
        values = [context.analysis[call.args[0]], context.analysis[call.args[1]]]  # type: ignore[index]
        return cls(node, context) if all(value == Batched(0) for value in values) else None

    def per_sample(self) -> fx.Node:
        """Emit [B, *weight shape]: one matrix product per sample and group."""
        shape = self.weight.meta["val"].shape

        def code(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            outer, patches = self._operands(gradient, x)
            return torch.matmul(outer, patches.mT).reshape(-1, *shape)

        return self._emit(code)

    @property
    def rounding(self) -> Rounding:
        """The rounding of ``weighted``."""
        return Rounding.of_convolution(self.gradient.meta["val"])

    def ghost(self) -> tuple[fx.Node, fx.Node]:
        """Emit the squared norms by Gram matrices over positions."""

        def code(gradient: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            outer, patches = self._operands(gradient, x)
            return ghost_square(outer, patches.mT, self.rounding, scale_left=True)

        return self._emit(code)

    def weighted(self, weights: fx.Node, before: fx.Node) -> fx.Node:
        """Emit the same backward with the output's gradient scaled, in float32."""

        def code(
            weights: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor, kernel: torch.Tensor
        ) -> torch.Tensor:
            if gradient.dtype in (torch.bfloat16, torch.float16):
                # A convolution rounds its result to its operands' precision.
                gradient, x, kernel = gradient.float(), x.float(), kernel.float()
            gradient = masked_scale(_FIRST, gradient, weights, scale=True)
            x = masked_scale(_FIRST, x, weights, scale=False)
            outputs = [False, True, False]
            return aten.convolution_backward(gradient, x, kernel, None, *self.geometry, outputs)[1]

        return self.context.emit(
            code,
            weights,
            self.gradient,
            self.input,
            self.weight,
            before=before,
            like=self.node,
        )

    def materialize_cost(self) -> Cost:
        """Patches written and read, one product per sample, and its result read twice."""
        batch, positions, outer, inner = self._sizes()
        device, value = self.context.device, self.gradient.meta["val"]
        size = value.element_size() * batch * self.groups
        flops = 2.0 * batch * self.groups * positions * outer * inner
        patches, result = size * positions * inner, size * outer * inner
        operands = patches + size * positions * outer
        apart = device.multiply(flops, value.dtype, operands + result)
        together = device.multiply(flops, value.dtype, size * positions * outer)
        moved = device.move(patches, result, result)
        return Cost(
            seconds=max(apart.seconds - together.seconds, 0.0) + moved.seconds,
            bytes=moved.bytes + patches + result,
            kept=result,
        )

    def ghost_cost(self) -> Cost:
        """Patches, two Gram matrices per group, and the weighted operands."""
        batch, positions, outer, inner = self._sizes()
        device, value = self.context.device, self.gradient.meta["val"]
        dtype = gram_dtype(value)
        pairs = batch * self.groups * positions**2
        written = 2.0 * (8.0 if dtype == torch.float64 else 4.0) * pairs
        size = value.element_size() * batch * positions * self.groups
        read = size * (outer + inner)
        grams = device.multiply(2.0 * pairs * (outer + inner), dtype, read + written)
        kept = size * (outer + inner / math.prod(self.kernel))
        return grams + device.move(size * inner, written, 2.0 * kept) + Cost(kept=kept)

    def _operands(
        self, gradient: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [B, g, O/g, L] and patches [B, g, C/g·k, L]."""
        outer, inner = (x, gradient) if self.transposed else (gradient, x)
        inner = functional.pad(inner, [side for p in reversed(self.padding) for side in (p, p)])
        dims = len(self.kernel)
        for i, (size, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            span = dilation * (size - 1) + 1
            inner = inner.unfold(2 + i, span, stride).narrow(2 + i, 0, outer.shape[2 + i])
            inner = inner[..., ::dilation]
        # [B, C, *positions, *kernel] → [B, g, C/g, *kernel, *positions]
        batch, channels = inner.shape[:2]
        inner = inner.unflatten(1, (self.groups, channels // self.groups))
        order = (0, 1, 2, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims))
        rows = channels // self.groups * math.prod(self.kernel)
        positions = math.prod(outer.shape[2:])
        patches = inner.permute(order).reshape(batch, self.groups, rows, positions)
        per_group = outer.shape[1] // self.groups
        return outer.reshape(batch, self.groups, per_group, positions), patches

    def _sizes(self) -> tuple[float, float, float, float]:
        """B, positions, and the rows of the two operands per group."""
        outer = (self.input if self.transposed else self.gradient).meta["val"]
        weight = self.weight.meta["val"].shape
        return (
            hint(outer.shape[0]),
            math.prod(hint(size) for size in outer.shape[2:]),
            hint(weight[0]) / self.groups,
            float(hint(weight[1]) * math.prod(self.kernel)),
        )

    def _emit(self, code: Any) -> Any:
        return self.context.emit(code, self.gradient, self.input, before=self.node.args[0])


class ConvolutionBiasSite(ReductionSite):
    """The bias's output of ``convolution_backward``: the sum over samples and positions."""

    kind: ClassVar[str] = "reduction"

    def __init__(self, node: fx.Node, context: Context) -> None:
        gradient = node.args[0].args[0]  # type: ignore[union-attr]
        ndim = gradient.meta["val"].ndim  # type: ignore[union-attr]
        dims = [dim for dim in range(ndim) if dim != 1]
        super().__init__(node, context, operand=gradient, dims=dims)  # type: ignore[arg-type]

    @classmethod
    def match(cls, node: fx.Node, context: Context) -> ConvolutionBiasSite | None:
        """Recognise the site."""
        call = _backward_call(node, 2)
        if call is None or context.analysis[call.args[0]] != Batched(0):  # type: ignore[index]
            return None
        return cls(node, context)


def _backward_call(node: fx.Node, output: int) -> fx.Node | None:
    """Return the ``convolution_backward`` of which a node picks one output."""
    call = node.args[0] if node.target is operator.getitem else None
    if not isinstance(call, fx.Node) or call.target is not aten.convolution_backward.default:
        return None
    return call if node.args[1] == output else None
