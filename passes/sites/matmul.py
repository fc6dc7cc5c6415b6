"""Matrix products that contract the batch axis: the weights of linear layers.

The gradient of a weight is Σ_i L_i R_i with L_i [m, T] and R_i [T, n] the sample's own columns
and rows. Its squared norm needs no gradient (Goodfellow 2015; Li et al. 2021, arXiv 2110.05679):

    ‖L_i R_i‖² = Σ_{t,s} (L_iᵀ L_i)_{ts} (R_i R_iᵀ)_{ts}
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from flashnorm_compile._torch import hint
from flashnorm_compile.passes.cost import Cost
from flashnorm_compile.passes.emit import half_matmul
from flashnorm_compile.passes.layout import SampleAxis, masked_scale
from flashnorm_compile.passes.sites.base import Context, Site, later
from flashnorm_compile.passes.sites.generic import contracted_axis
from flashnorm_compile.passes.sites.rounding import (
    Rounding,
    ghost_product,
    ghost_square,
    gram_dtype,
)

aten = torch.ops.aten
_OPERATIONS = {aten.mm.default, aten.bmm.default}


class MatmulSite(Site):
    """``mm`` or ``bmm`` whose contracted dim holds the samples."""

    kind: ClassVar[str] = "matmul"

    def __init__(self, node: fx.Node, context: Context) -> None:
        super().__init__(node, context)
        self.left, self.right = node.args[0], node.args[1]
        ndim = node.meta["val"].ndim
        axis = contracted_axis(node, context)
        assert axis is not None
        self.left_axis = SampleAxis.of(axis.at(ndim - 1))
        self.right_axis = SampleAxis.of(axis.at(ndim - 2))

    @classmethod
    def match(cls, node: fx.Node, context: Context) -> MatmulSite | None:
        """Recognise the site."""
        if node.target not in _OPERATIONS or contracted_axis(node, context) is None:
            return None
        return cls(node, context)

    def per_sample(self) -> fx.Node:
        """Emit [B, (b,) m, n]."""
        rows, padded = self.node.meta["val"].shape[-2], self.padded is not None
        axes = self.left_axis, self.right_axis

        def code(left: torch.Tensor, right: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            product = torch.matmul(*sample_major(axes, left, right, batch.shape[0]))
            return product.narrow(-2, 0, rows) if padded else product

        return self._emit(code)

    def weighted(self, weights: fx.Node, before: fx.Node) -> fx.Node:
        """Emit (c∘L) R, scaling the narrower operand."""
        rows, padded = self.node.meta["val"].shape[-2], self.padded is not None
        left_axis, right_axis, scale_left = self.left_axis, self.right_axis, self._scale_left

        def code(left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            if left.dtype == torch.float16:
                # c∘L may fall below what float16 holds with full precision.
                left, right = left.float(), right.float()
            right = masked_scale(right_axis, right, weights, scale=not scale_left)
            if padded:
                return half_matmul(left, right).narrow(-2, 0, rows)
            left = masked_scale(left_axis, left, weights, scale=scale_left)
            return half_matmul(left, right)

        left = self.padded or self.left
        return self.context.emit(code, left, self.right, weights, before=before, like=self.node)

    @property
    def rounding(self) -> Rounding:
        """The rounding of ``weighted``."""
        return Rounding.of_matmul(self.left.meta["val"])

    def ghost(self) -> tuple[fx.Node, fx.Node]:
        """Emit squared norms by Gram matrices, [B, T, T] each; no T×T matrix where T is 1."""
        axes = self.left_axis, self.right_axis
        rounding, scale_left = self.rounding, self._scale_left

        def code(
            left: torch.Tensor, right: torch.Tensor, batch: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            left, right = sample_major(axes, left, right, batch.shape[0])
            return ghost_square(left, right, rounding, scale_left=scale_left)

        return self._emit(code)

    def inner_product_cost(self, other: Site) -> Cost | None:
        """Know plain matrix products."""
        plain = self.node.meta["val"].ndim == 2
        if not plain or not isinstance(other, MatmulSite) or other.node.meta["val"].ndim != 2:
            return None
        m, tokens, n = self._sizes()
        return self._gram_cost(tokens, other._sizes()[1], m + n)

    def inner_product(
        self, other: Site, transposed: bool, other_transposed: bool
    ) -> tuple[fx.Node, fx.Node]:
        """Emit ⟨L₁R₁, L₂R₂⟩ = Σ (L₁ᵀL₂)∘(R₁R₂ᵀ), the second swapped if stored transposed."""
        assert isinstance(other, MatmulSite)
        swap = transposed != other_transposed
        axes, axes2 = (self.left_axis, self.right_axis), (other.left_axis, other.right_axis)

        def code(
            left: torch.Tensor,
            right: torch.Tensor,
            left2: torch.Tensor,
            right2: torch.Tensor,
            batch: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            left, right = sample_major(axes, left, right, batch.shape[0])
            left2, right2 = sample_major(axes2, left2, right2, batch.shape[0])
            if swap:
                left2, right2 = right2.mT, left2.mT
            return ghost_product(left, right, left2, right2)

        return self.context.emit(
            code,
            self.left,
            self.right,
            other.left,
            other.right,
            self.context.batch,
            before=later(self.node, other.node),
        )

    def materialize_cost(self) -> Cost:
        """One product per sample in place of one over all; its result is read twice."""
        m, tokens, n = self._sizes()
        device, dtype, size = self.context.device, self.left.meta["val"].dtype, self._element_size()
        batch, lead = self.context.batch_size, self._lead()
        flops = 2.0 * batch * lead * tokens * m * n
        operands = size * batch * lead * tokens * (m + n)
        result = size * batch * lead * m * n
        apart = device.multiply(flops, dtype, operands + result)
        together = device.multiply(flops, dtype, operands + result / batch)
        read = device.move(result, result)
        return Cost(
            seconds=max(apart.seconds - together.seconds, 0.0) + read.seconds,
            bytes=result + read.bytes,
            kept=result,
        )

    def ghost_cost(self) -> Cost:
        """Two Gram matrices, and both operands kept, and copied with weights."""
        m, tokens, n = self._sizes()
        kept = self._element_size() * self.context.batch_size * self._lead() * tokens * (m + n)
        copies = self.context.device.move(2.0 * kept)
        return self._gram_cost(tokens, tokens, m + n) + copies + Cost(kept=kept)

    def _gram_cost(self, tokens: float, others: float, width: float) -> Cost:
        """Two products [T, S] over rows of ``width`` in all, and a pass that reads them."""
        device, left = self.context.device, self.left.meta["val"]
        dtype = gram_dtype(left)
        pairs = self.context.batch_size * self._lead() * tokens * others
        written = 2.0 * (8.0 if dtype == torch.float64 else 4.0) * pairs
        rows = self.context.batch_size * self._lead() * (tokens + others) * width
        product = device.multiply(2.0 * pairs * width, dtype, left.element_size() * rows + written)
        return product + device.move(written)

    def _sizes(self) -> tuple[float, float, float]:
        """Return m, the tokens of a sample, and n."""
        tokens = hint(self.left.meta["val"].shape[-1]) / self.context.batch_size
        return self._width(self.left, -2), tokens, self._width(self.right, -1)

    def _lead(self) -> float:
        """How many products are side by side."""
        return hint(self.left.meta["val"].shape[0]) if self.left.meta["val"].ndim == 3 else 1.0

    def _emit(self, code: Callable[..., Any]) -> Any:
        """Emit code of both operands, the left one padded where that pays."""
        context = self.context
        return context.emit(
            code, self.padded or self.left, self.right, context.batch, before=self.node
        )

    @property
    def padded(self) -> fx.Node | None:
        """The left operand with rows of zeros up to a multiple of 8, if its size asks for it.

        Matrix units want aligned rows: over a vocabulary of 50257 a product is four times slower
        than over 50264. Inductor would pad the operands of each product by themselves; here the
        activation's gradient reads the same padded copy. It holds 0 in place of what is not
        finite, so that no product with it has to mask samples: see ``defects``.
        """
        return None if self._padding is None else self._padding[0]

    @property
    def defects(self) -> fx.Node | None:
        """[B]: infinite for samples with an entry that ``padded`` left out, else 0."""
        return None if self._padding is None else self._padding[1]

    @functools.cached_property
    def _padding(self) -> tuple[fx.Node, fx.Node] | None:
        if not wants_padding(self.left.meta["val"]):
            return None
        extra, context = 8 - self.left.meta["val"].shape[0] % 8, self.context
        transposed = self.left.target is aten.permute.default
        base = self.left.args[0] if transposed else self.left
        axis = SampleAxis(0, self.left_axis.outer, self.left_axis.inner)

        def code(x: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            # A float32 that bfloat16 rounds to infinity is not finite either: Inductor compares
            # before it rounds.
            finite = x.abs() <= torch.finfo(x.dtype).max
            clean = torch.where(finite, x, torch.zeros((), dtype=x.dtype, device=x.device))
            tokens = (~finite).any(1 if transposed else 0)
            samples = axis.to_front(tokens, batch.shape[0]).reshape(batch.shape[0], -1).any(1)
            defects = samples.new_zeros(samples.shape, dtype=torch.float32)
            defects = defects.masked_fill(samples, float("inf"))
            return _with_columns(clean, extra) if transposed else _with_rows(clean, extra), defects

        padded, defects = context.emit(code, base, context.batch, before=base.next, like=base)
        if not transposed:
            return padded, defects
        for user in list(base.users):
            if user.target is aten.mm.default and user.args[0] is base:
                # In place: other sites hold on to the node, whose value stays the same.
                weight = context.emit(lambda w: _with_rows(w, extra), user.args[1], before=user)
                user.args = (padded, weight)
        return context.emit(lambda x: x.permute(1, 0), padded, before=self.node), defects

    @property
    def _scale_left(self) -> bool:
        narrow = self._width(self.left, -2) <= self._width(self.right, -1)
        return narrow and self.padded is None

    def _width(self, operand: fx.Node, dim: int) -> int:
        return hint(operand.meta["val"].shape[dim])

    def _element_size(self) -> int:
        return self.left.meta["val"].element_size()


def sample_major(
    axes: tuple[SampleAxis, SampleAxis], left: torch.Tensor, right: torch.Tensor, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both operands of a product as [B, ...], each sample's part where it was."""
    return axes[0].slices(left, batch_size), axes[1].slices(right, batch_size)


def wants_padding(left: torch.Tensor) -> bool:
    """Whether products with a left operand [m, n] are slow for want of a few rows."""
    rows = left.shape[0]
    unaligned = isinstance(rows, int) and rows % 8 != 0 and rows >= 1024
    return unaligned and left.ndim == 2 and left.is_cuda and left.element_size() == 2


def _with_rows(x: torch.Tensor, count: int) -> torch.Tensor:
    """Append rows of zeros."""
    return aten.constant_pad_nd(x, [0, 0, 0, count])


def _with_columns(x: torch.Tensor, count: int) -> torch.Tensor:
    """Append columns of zeros.

    Inductor lets what computes ``x`` write right into this copy. After ``constant_pad_nd``, whose
    loop has another size, it keeps ``x`` as well: the float32 gradient of all logits.
    """
    rows, columns = x.shape
    width = columns + count
    wide = x.new_empty(rows, width)
    wide = aten.as_strided_scatter(wide, x, [rows, columns], [width, 1], 0)
    zeros = x.new_zeros(rows, count)
    return aten.as_strided_scatter(wide, zeros, [rows, count], [width, 1], columns)
