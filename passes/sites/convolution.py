"""Convolution weights, of any dimension, grouped, dilated or transposed."""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch import fx

from flashnorm_compile.passes.batch_axis.values import Batched
from flashnorm_compile.passes.layout import SampleAxis, masked_scale
from flashnorm_compile.passes.sites.base import Context
from flashnorm_compile.passes.sites.generic import GenericSite
from flashnorm_compile.passes.sites.reduction import ReductionSite

aten = torch.ops.aten
_FIRST = SampleAxis(0, 1, 1)


class ConvolutionSite(GenericSite):
    """The weight's output of ``convolution_backward``.

    Per-sample gradients come from one backward over B·groups groups (Rochette et al. 2019,
    arXiv 1912.06015), which is what vmap makes of the operation.
    """

    kind: ClassVar[str] = "convolution"

    @classmethod
    def match(cls, node: fx.Node, context: Context) -> ConvolutionSite | None:
        """Recognise the site."""
        call = _backward_call(node, 1)
        if call is None:
            return None
        values = [context.analysis[call.args[0]], context.analysis[call.args[1]]]
        return cls(node, context) if all(value == Batched(0) for value in values) else None

    def weighted(self, weights: fx.Node, before: fx.Node) -> fx.Node:
        """Emit the same backward with the output's gradient scaled."""
        rest = self.call.args[2:10]

        def code(
            weights: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor, kernel: torch.Tensor
        ) -> torch.Tensor:
            if gradient.dtype in (torch.bfloat16, torch.float16) and not gradient.is_cuda:
                gradient, x, kernel = gradient.float(), x.float(), kernel.float()
            result = aten.convolution_backward(
                masked_scale(_FIRST, gradient, weights, scale=True),
                masked_scale(_FIRST, x, weights, scale=False),
                kernel,
                None,
                *rest[2:],
                [False, True, False],
            )[1]
            return result.float() if result.dtype in (torch.bfloat16, torch.float16) else result

        gradient, x, kernel = self.call.args[:3]
        return self.context.emit(
            code, weights, gradient, x, kernel, before=before, like=self.node
        )

    def _run(self, *operands: torch.Tensor) -> torch.Tensor:
        values = dict(zip(self.operands, operands, strict=True))
        gradient, x, kernel, _, *rest = (
            values[arg] if isinstance(arg, fx.Node) else arg for arg in self.call.args
        )
        # Only the weight's gradient is wanted.
        return aten.convolution_backward(
            gradient, x, kernel, None, *rest[:-1], [False, True, False]
        )[1]


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
