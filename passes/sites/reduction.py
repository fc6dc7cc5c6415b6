"""Sums over the batch: biases, norm scales, position embeddings, any broadcast parameter."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from flashnorm_compile.passes.batch_axis.values import Batched
from flashnorm_compile.passes.cost import Cost
from flashnorm_compile.passes.layout import SampleAxis, masked_scale
from flashnorm_compile.passes.sites.base import Context, Site, numel

aten = torch.ops.aten


class ReductionSite(Site):
    """``sum`` over dims that include the batch axis."""

    kind: ClassVar[str] = "reduction"

    def __init__(
        self,
        node: fx.Node,
        context: Context,
        *,
        operand: fx.Node,
        dims: list[int],
        keepdim: bool = False,
    ) -> None:
        super().__init__(node, context)
        self.operand = operand
        self.dims = dims
        self.keepdim = keepdim
        self.axis = SampleAxis.of(context.analysis[operand])

    @classmethod
    def match(cls, node: fx.Node, context: Context) -> Site | None:
        """Recognise the site."""
        if node.target not in (aten.sum.dim_IntList, aten.sum.default):
            return None
        operand = node.args[0]
        if not isinstance(context.analysis[operand], Batched):
            return None
        ndim = operand.meta["val"].ndim
        dims = node.args[1] if len(node.args) > 1 and node.args[1] else range(ndim)
        keepdim = bool(node.args[2]) if len(node.args) > 2 else False
        return cls(
            node,
            context,
            operand=operand,
            dims=sorted(dim % ndim for dim in dims),
            keepdim=keepdim,
        )

    def per_sample(self) -> fx.Node:
        """Emit [B, *shape]: the sample's own sum over the other reduced dims."""
        axis, keepdim, others = self.axis, self.keepdim, [dim + 1 for dim in self.dims]

        def code(x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            x = axis.slices(x, batch.shape[0])
            if axis.plain and len(others) == 1:
                x = x if keepdim else x.squeeze(others[0])
                return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            return _wide_sum(x, others, keepdim)

        return self.context.emit(code, self.operand, self.context.batch, before=self.node)

    def weighted(self, weights: fx.Node, before: fx.Node) -> fx.Node:
        """Emit the sum of the scaled operand."""
        axis, dims, keepdim = self.axis, self.dims, self.keepdim

        def code(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            return _wide_sum(masked_scale(axis, wide, weights, scale=True), dims, keepdim)

        return self.context.emit(code, self.operand, weights, before=before, like=self.node)

    def materialize_cost(self) -> Cost:
        """What is kept is written, and read twice."""
        kept = 4.0 * self.context.batch_size * numel(self.node)
        return self.context.device.move(kept, kept, kept) + Cost(kept=kept)


def _wide_sum(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    return torch.sum(x, dims, keepdim=keepdim, dtype=dtype)
