"""Any other operation that contracts the batch axis: the same operation, once per sample."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from flashnorm_compile.kernels.release.reference import weighted_sum
from flashnorm_compile.passes.batch_axis.values import Batched, Value
from flashnorm_compile.passes.layout import SampleAxis
from flashnorm_compile.passes.sample_map import run_mapped
from flashnorm_compile.passes.sites.base import Context, Cost, Site, hint, numel

aten = torch.ops.aten


class GenericSite(Site):
    """A node, mapped over samples by ``torch.func.vmap``.

    Each sample sees its own slice of every batched operand, with the batch axis kept at size
    outer·inner, and all of every constant.
    """

    kind: ClassVar[str] = "generic"

    def __init__(self, node: fx.Node, context: Context) -> None:
        super().__init__(node, context)
        picks = node.target is operator.getitem
        self.call = node.args[0] if picks else node
        self.pick = node.args[1] if picks else None
        self.operands = list(self.call.all_input_nodes)
        self.axes: dict[int, SampleAxis] = {
            i: SampleAxis.of(value)
            for i, operand in enumerate(self.operands)
            if isinstance(value := context.analysis[operand], Batched)
        }

    @classmethod
    def match(cls, node: fx.Node, context: Context) -> Site | None:
        """Recognise an operation that is a sum over samples of itself."""
        additive = _ADDITIVE.get(node.target)
        return cls(node, context) if additive is not None and additive(node, context) else None

    def per_sample(self) -> fx.Node:
        """Emit [B, *shape] by mapping the operation over samples."""

        def code(batch: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
            values = [
                self.axes[i].slices(x, batch.shape[0]) if i in self.axes else x
                for i, x in enumerate(operands)
            ]
            dims = tuple(0 if i in self.axes else None for i in range(len(values)))
            result = torch.func.vmap(self._run, in_dims=dims)(*values)
            return result.float() if result.dtype in (torch.bfloat16, torch.float16) else result

        return self.context.emit(code, self.context.batch, *self.operands, before=self.call)

    def weighted(self, weights: fx.Node, before: fx.Node) -> fx.Node:
        """Emit Σ_i weights[i] · per-sample gradient_i."""
        return self.context.emit(
            weighted_sum, self.per_sample(), weights, before=before, like=self.node
        )

    def materialize_cost(self) -> Cost:
        """Write and read every per-sample gradient."""
        batch = hint(self.context.batch.meta["val"].shape[0])
        return Cost(flops=0.0, bytes=12.0 * batch * numel(self.node))

    def _run(self, *operands: torch.Tensor) -> torch.Tensor:
        values = dict(zip(self.operands, operands, strict=True))

        def substitute(node: fx.Node) -> Any:
            return values[node]

        args = fx.map_arg(self.call.args, substitute)
        kwargs = fx.map_arg(self.call.kwargs, substitute)
        result = run_mapped(self.call.target, args, kwargs)
        return result if self.pick is None else result[self.pick]


def is_zero_fill(node: fx.Node) -> bool:
    """Return whether a node is a tensor of zeros."""
    if node.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return True
    if node.target is aten.scalar_tensor.default:
        return bool(node.args[0] == 0)
    return node.target in (aten.full.default, aten.full_like.default) and bool(node.args[1] == 0)


def _scattered_rows(node: fx.Node, context: Context) -> bool:
    """index_put into zeros, accumulating: every row written must be of one sample."""
    if node.target is aten.index_put.default:
        if node.args[3:] != (True,):
            return False
        base, indices, values = node.args[:3]
        mask = None
    else:
        base, mask, indices, values = node.args
    given = [(i, index) for i, index in enumerate(indices) if index is not None]  # type: ignore[union-attr, arg-type]
    if not is_zero_fill(base) or (len(given) != len(indices) and len(given) != 1):  # type: ignore[arg-type]
        return False
    start = given[0][0]
    width = max(index.meta["val"].ndim for _, index in given)
    rank = base.meta["val"].ndim - len(given) + width  # type: ignore[union-attr]
    rows = [_right_aligned(context.analysis[index], index, start + width) for _, index in given]
    rows.append(_right_aligned(context.analysis[values], values, rank))  # type: ignore[index, arg-type]
    if mask is not None:
        rows.append(_right_aligned(context.analysis[mask], mask, rank))  # type: ignore[index, arg-type]
    batched = {row for row in rows if row is not None}
    return len(batched) == 1 and start <= next(iter(batched)).dim < start + width


def _right_aligned(value: Value, node: fx.Node, rank: int) -> Batched | None:
    """The batch axis where a value lands when it is broadcast to ``rank`` dims."""
    if not isinstance(value, Batched):
        return None
    return value.at(value.dim + rank - node.meta["val"].ndim)


def _scatter_add(node: fx.Node, context: Context) -> bool:
    base, _, index, source = node.args
    values = {context.analysis[index], context.analysis[source]}  # type: ignore[index]
    return is_zero_fill(base) and len(values) == 1  # type: ignore[arg-type]


def _inner_products(node: fx.Node, context: Context) -> bool:
    """Mv and dot: both operands hold the samples along the contracted dim, or one is constant."""
    matrix, vector = node.args
    values = [context.analysis[matrix], context.analysis[vector]]  # type: ignore[index]
    dims = [matrix.meta["val"].ndim - 1, 0]  # type: ignore[union-attr]
    batched = {
        value.at(0)
        for value, dim in zip(values, dims, strict=True)
        if isinstance(value, Batched) and value.dim == dim
    }
    wanted = sum(isinstance(value, Batched) for value in values)
    found = sum(
        isinstance(value, Batched) and value.dim == dim
        for value, dim in zip(values, dims, strict=True)
    )
    return wanted == found and len(batched) == 1


# Operations that are sums over samples of themselves, each with the check that they are.
_ADDITIVE: dict[object, Callable[[fx.Node, Context], bool]] = {
    aten.index_put.default: _scattered_rows,
    aten._unsafe_masked_index_put_accumulate.default: _scattered_rows,
    aten.scatter_add.default: _scatter_add,
    aten.mv.default: _inner_products,
    aten.dot.default: _inner_products,
}
