"""Any other operation that contracts the batch axis: the same operation, once per sample."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from flashnorm_compile._torch import size_expr
from flashnorm_compile.kernels.release.reference import weighted_sum
from flashnorm_compile.passes.batch_axis.call import same_axis
from flashnorm_compile.passes.batch_axis.values import Batched, Value
from flashnorm_compile.passes.cost import Cost
from flashnorm_compile.passes.layout import SampleAxis
from flashnorm_compile.passes.sample_map import run_mapped
from flashnorm_compile.passes.sites.base import Context, Site, numel

aten = torch.ops.aten


class GenericSite(Site):
    """A node, mapped over samples by ``torch.func.vmap``.

    Each sample sees its own slice of every batched operand, with the batch axis kept at size
    outer·inner. Of a constant it sees the rows that its own rows meet, and all of one that has no
    such rows.
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
        beside = _BESIDE.get(self.call.target, lambda node, context: {})(self.call, context)
        for i, operand in enumerate(self.operands):
            if i not in self.axes and operand in beside:
                self.axes[i] = SampleAxis.of(beside[operand])

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
        """Every per-sample gradient is written, and read twice."""
        kept = 4.0 * self.context.batch_size * numel(self.node)
        return self.context.device.move(kept, kept, kept) + Cost(kept=kept)

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


@dataclass(frozen=True)
class _Rows:
    """An accumulating index_put: rows of the base at dims [start, start + width) of the values.

    Attributes:
        aligned: its operands, each with the rank it broadcasts to.
    """

    base: fx.Node
    start: int
    width: int
    aligned: list[tuple[fx.Node, int]]


def _read_rows(node: fx.Node) -> _Rows | None:
    mask: Any = None
    base: Any
    indices: Any
    values: Any
    if node.target is aten.index_put.default:
        if node.args[3:] != (True,):
            return None
        base, indices, values = node.args[:3]
    else:
        base, mask, indices, values = node.args
    given = [(i, index) for i, index in enumerate(indices) if index is not None]
    if not is_zero_fill(base) or (len(given) != len(indices) and len(given) != 1):
        return None
    # A mask for an index has a dim for each dim that it selects from.
    if any(index.meta["val"].dtype in (torch.bool, torch.uint8) for _, index in given):
        return None
    start = given[0][0]
    width = max(index.meta["val"].ndim for _, index in given)
    rank = base.meta["val"].ndim - len(given) + width
    aligned = [(index, start + width) for _, index in given] + [(values, rank)]
    return _Rows(base, start, width, aligned if mask is None else [*aligned, (mask, rank)])


def _row_axis(rows: _Rows, context: Context) -> Batched | None:
    """Where the samples are among the values, if all operands agree on it."""
    found = {
        axis
        for node, rank in rows.aligned
        if (axis := _right_aligned(context.analysis[node], node, rank)) is not None
    }
    if len(found) != 1:
        return None
    (axis,) = found
    return axis if rows.start <= axis.dim < rows.start + rows.width else None


def _scattered_rows(node: fx.Node, context: Context) -> bool:
    """index_put into zeros, accumulating: every row written must be of one sample."""
    rows = _read_rows(node)
    return rows is not None and _row_axis(rows, context) is not None


def _beside_rows(node: fx.Node, context: Context) -> dict[fx.Node, Batched]:
    """Constants with an entry for every row: their axis, as if they were batched."""
    rows = _read_rows(node)
    axis = _row_axis(rows, context) if rows is not None else None
    if rows is None or axis is None:
        return {}
    found = {}
    for operand, rank in rows.aligned:
        shape = operand.meta["val"].shape
        dim = axis.dim - rank + len(shape)
        if dim >= 0 and size_expr(shape[dim]) != 1:
            found[operand] = axis.at(dim)
    return found


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
    return contracted_axis(node, context) is not None


def _beside_inner_product(node: fx.Node, context: Context) -> dict[fx.Node, Batched]:
    axis = contracted_axis(node, context)
    dims = contracted_dims(node)
    return {} if axis is None else {operand: axis.at(dim) for operand, dim in dims}


def contracted_dims(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Return the two operands of a product, each with the dim that is summed over."""
    left: Any
    right: Any
    left, right = node.args[:2]
    return [
        (left, left.meta["val"].ndim - 1),
        (right, max(right.meta["val"].ndim - 2, 0)),
    ]


def contracted_axis(node: fx.Node, context: Context) -> Batched | None:
    """Return the batch axis that a product sums over, with dim 0.

    The two operands must hold the samples in the same order, (outer, B, inner), or one of them
    must be constant: it then has a row for every row of the other, the same for any data. None
    where samples meet in another way.
    """
    axes = []
    for operand, dim in contracted_dims(node):
        value = context.analysis[operand]
        if isinstance(value, Batched):
            if value.dim != dim:
                return None
            axes.append(value.at(0))
    return axes[0] if axes and all(same_axis(axes[0], axis) for axis in axes) else None


# Operations that are sums over samples of themselves, each with the check that they are.
_ADDITIVE: dict[object, Callable[[fx.Node, Context], bool]] = {
    aten.index_put.default: _scattered_rows,
    aten._unsafe_masked_index_put_accumulate.default: _scattered_rows,
    aten.scatter_add.default: _scatter_add,
    aten.mv.default: _inner_products,
    aten.dot.default: _inner_products,
}

# How their constants are to be divided among the samples.
_BESIDE: dict[object, Callable[[fx.Node, Context], dict[fx.Node, Batched]]] = {
    aten.index_put.default: _beside_rows,
    aten._unsafe_masked_index_put_accumulate.default: _beside_rows,
    aten.mv.default: _beside_inner_product,
    aten.dot.default: _beside_inner_product,
}
