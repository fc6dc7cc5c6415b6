"""Matrix products over samples, by kernels of this package: no copies, and no T×T in memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from flashnorm_compile._torch import hint
from flashnorm_compile.kernels.device import has_fast_kernels
from flashnorm_compile.kernels.flash_norm import flash_norm, materialize_norms
from flashnorm_compile.kernels.ghost_norm import ghost_norm, ghost_norms
from flashnorm_compile.kernels.weighted_gradient import weighted_gradients
from flashnorm_compile.passes.cost import Cost
from flashnorm_compile.passes.layout import SampleAxis
from flashnorm_compile.passes.sites.base import Context, Site, numel
from flashnorm_compile.passes.sites.generic import contracted_axis
from flashnorm_compile.passes.sites.matmul import MatmulSite, sample_major
from flashnorm_compile.passes.sites.rounding import (
    HALF,
    Rounding,
    bounded_square,
    gram_error,
    squares_above,
)

aten = torch.ops.aten
# On a GPU. A kernel takes this many tokens of a sample at once; of fewer, most of it is idle.
MIN_TOKENS = 32
# Rows and columns of the smallest tile: of a narrower product, such as a low-rank adapter's, most
# of it would be idle.
MIN_WIDTH = 64
# All their sums are there before the first is released.
SITES_PER_CALL = 32
# Operands of sites whose per-sample gradients are made together wait for each other.
OPERAND_BYTES = 2**29


class FusedMatmulSite(MatmulSite):
    """``mm`` whose contracted dim holds some tokens of each sample."""

    kind: ClassVar[str] = "matmul"
    fused: ClassVar[bool] = True

    @classmethod
    def match(cls, node: fx.Node, context: Context) -> FusedMatmulSite | None:
        """Recognise the site where kernels are asked for, and fast."""
        if node.target is not aten.mm.default or contracted_axis(node, context) is None:
            return None
        left = node.args[0].meta["val"]
        wide = min(map(hint, node.meta["val"].shape)) >= MIN_WIDTH
        if not context.wants_kernels(faster=wide and has_fast_kernels(left.device)):
            return None
        tokens = hint(left.shape[-1]) // context.batch_size
        if left.is_cuda:
            suits = left.dtype in HALF and tokens >= MIN_TOKENS
        else:
            suits = left.dtype != torch.float64 and tokens > 1
        return cls(node, context) if suits else None

    def measured(self) -> tuple[fx.Node, fx.Node]:
        """Emit [B, m, n] and the norms of what is stored."""
        samples, (square,) = materialized_together([self])
        return samples[self], square

    def weighted(self, weights: fx.Node, before: fx.Node) -> fx.Node:
        """Emit Σ_i c_i L_i R_i, weighed after each sample's product."""
        return weighted_together([self], weights, before)[self]

    @property
    def rounding(self) -> Rounding:
        """The rounding of ``weighted``: operands enter it as they are."""
        return Rounding.of_exact_products(self.left.meta["val"])

    def ghost(self) -> tuple[fx.Node, fx.Node]:
        """Emit squared norms by Gram matrices of which only tiles are ever there."""
        axes, rounding = (self.left_axis, self.right_axis), self.rounding

        def code(
            left: torch.Tensor, right: torch.Tensor, batch: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            left, right = sample_major(axes, left, right, batch.shape[0])
            errors = _gram_errors(left, right)
            return _square_and_slack(
                ghost_norm(left, right, *errors), errors, left.shape[2], rounding
            )

        return self._emit(code)  # type: ignore[no-any-return]

    def flash(self) -> tuple[fx.Node, fx.Node]:
        """Emit squared norms of products of which only tiles are ever there.

        Their slack takes the spread to be what it can be at most, ‖L_i‖‖R_i‖: the sum that is
        squared rounds as the one that is released, and both errors are relative to it.
        """
        axes, rounding = (self.left_axis, self.right_axis), self.rounding

        def code(
            left: torch.Tensor, right: torch.Tensor, batch: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            left, right = sample_major(axes, left, right, batch.shape[0])
            squares, _ = flash_norm(left, right)
            spread = 2 * (squares_above(left) * squares_above(right)).sqrt()
            return squares, rounding.spread_slack(spread, left.shape[2])

        return self._emit(code)  # type: ignore[no-any-return]

    def materialize_cost(self) -> Cost:
        """Each sample's product is written, and read once."""
        m, tokens, n = self._sizes()
        device, dtype, size = self.context.device, self.left.meta["val"].dtype, self._element_size()
        batch = self.context.batch_size
        flops, result = 2.0 * batch * tokens * m * n, size * batch * m * n
        operands = size * batch * tokens * (m + n)
        apart = device.multiply(flops, dtype, operands + result)
        together = device.multiply(flops, dtype, operands)
        read = device.move(result)
        return Cost(
            seconds=apart.seconds - together.seconds + read.seconds,
            bytes=result + read.bytes,
            kept=result,
        )

    def ghost_cost(self) -> Cost:
        """Half of two Gram matrices, and both operands kept."""
        m, tokens, n = self._sizes()
        rows = self.context.batch_size * tokens * (m + n)
        size = self._element_size()
        product = self._once(rows * (tokens + MIN_TOKENS), size * rows)
        return product + Cost(kept=size * rows)

    def flash_cost(self) -> Cost:
        """Each sample's product once more, norms of the operands, and both of them kept."""
        m, tokens, n = self._sizes()
        batch, size = self.context.batch_size, self._element_size()
        kept = size * batch * tokens * (m + n)
        product = self._once(2.0 * batch * tokens * m * n, kept)
        return product + self.context.device.move(kept) + Cost(kept=kept)

    def _shape(self) -> Hashable:
        """Of a sample's operands, if it is known; else what no other site has."""
        m, n = self.left.meta["val"].shape[0], self.right.meta["val"].shape[1]
        sizes = m, n, self.left_axis.outer, self.left_axis.inner
        return sizes if all(isinstance(size, int) for size in sizes) else self.node

    def _once(self, flops: float, moved: float) -> Cost:
        return self.context.device.multiply(flops, self.left.meta["val"].dtype, moved)


def materialized_together(
    sites: Sequence[FusedMatmulSite],
) -> tuple[dict[FusedMatmulSite, fx.Node], list[fx.Node]]:
    """Emit what ``measured`` does for many sites, in launches that some share.

    Returns:
        The per-sample gradients, and squared norms [B], each of some sites.
    """
    samples: dict[FusedMatmulSite, fx.Node] = {}
    squares: list[fx.Node] = []
    for some in _neighbours(sites):
        axes = [(site.left_axis, site.right_axis) for site in some]
        rows = [site.node.meta["val"].shape[-2] for site in some]

        def code(
            batch: torch.Tensor, *operands: torch.Tensor, axes: Any = axes, rows: Any = rows
        ) -> tuple[list[torch.Tensor], torch.Tensor]:
            lefts, rights = zip(*_pairs(axes, operands, batch.shape[0]), strict=True)
            found, total = materialize_norms(list(lefts), list(rights), lefts[0].dtype)
            return _without_padding(found, rows), total

        operands = _operands(some)
        context = some[0].context
        last = max(operands)
        found, total = context.emit(code, context.batch, *operands, before=last.next, like=last)
        samples |= dict(zip(some, found, strict=True))
        squares.append(total)
    return samples, squares


def _neighbours(sites: Sequence[FusedMatmulSite]) -> Iterator[list[FusedMatmulSite]]:
    """Cut sites of one dtype, as they follow each other, where operands become too many bytes."""
    part: list[FusedMatmulSite] = []
    size = 0.0
    for site in sorted(sites, key=lambda site: site.node):
        operands = _operands([site])
        more = sum(numel(x) * x.meta["val"].element_size() for x in operands)
        alike = not part or part[0].left.meta["val"].dtype == site.left.meta["val"].dtype
        if part and (size + more > OPERAND_BYTES or not alike):
            yield part
            part, size = [], 0.0
        part.append(site)
        size += more
    if part:
        yield part


def ghosts_together(sites: Sequence[FusedMatmulSite]) -> list[fx.Node]:
    """Emit squared norms [B] that no contribution exceeds, by ``ghost`` of many sites.

    They are found once the operands of all are there, which must be kept for the weighted sums
    anyway: launches are shared, and what follows them is done once for sites of one shape, whose
    squares are added up.
    """
    squares: list[fx.Node] = []
    for dtype in dict.fromkeys(site.left.meta["val"].dtype for site in sites):
        shapes: dict[Hashable, list[FusedMatmulSite]] = {}
        for site in sites:
            if site.left.meta["val"].dtype == dtype:
                shapes.setdefault(site._shape(), []).append(site)
        some = [site for alike in shapes.values() for site in alike]
        counts = [len(alike) for alike in shapes.values()]
        axes = [(site.left_axis, site.right_axis) for site in some]

        def code(
            batch: torch.Tensor,
            *operands: torch.Tensor,
            axes: Any = axes,
            counts: list[int] = counts,
            rounding: Rounding = some[0].rounding,
        ) -> list[torch.Tensor]:
            pairs = _pairs(axes, operands, batch.shape[0])
            errors = [_gram_errors(left, right) for left, right in pairs]
            lefts, rights = zip(*pairs, strict=True)
            left_errors, right_errors = zip(*errors, strict=True)
            sums = ghost_norms(list(lefts), list(rights), list(left_errors), list(right_errors))
            totals = []
            first = 0
            for count in counts:
                square, slack = _square_and_slack(
                    sums[:, first : first + count], errors[first], lefts[first].shape[2], rounding
                )
                bounded = bounded_square([square], [slack], (), (), rounding.tolerance)
                totals.append(bounded.sum(0))
                first += count
            return totals

        operands = _operands(some)
        context = some[0].context
        last = max(operands)
        squares += context.emit(code, context.batch, *operands, before=last.next, like=last)
    return squares


def weighted_together(
    sites: Sequence[FusedMatmulSite], weights: fx.Node, before: fx.Node
) -> dict[Site, fx.Node]:
    """Emit what ``weighted`` does for many sites: one launch serves several."""
    sums: dict[Site, fx.Node] = {}
    for first in range(0, len(sites), SITES_PER_CALL):
        some = sites[first : first + SITES_PER_CALL]
        axes = [(site.left_axis, site.right_axis) for site in some]
        rows = [site.node.meta["val"].shape[-2] for site in some]

        def code(
            weights: torch.Tensor, *operands: torch.Tensor, axes: Any = axes, rows: Any = rows
        ) -> list[torch.Tensor]:
            pairs = _pairs(axes, operands, weights.shape[0])
            totals = weighted_gradients([x for x, _ in pairs], [y for _, y in pairs], weights)
            return _without_padding(totals, rows)

        nodes = some[0].context.emit(code, weights, *_operands(some), before=before)
        sums |= dict(zip(some, nodes, strict=True))
    return sums


def _without_padding(products: Sequence[torch.Tensor], rows: Sequence[int]) -> list[torch.Tensor]:
    """Return products [..., m, n] without rows that were appended to reach a multiple of 8."""
    return [
        product if product.shape[-2] == count else product.narrow(-2, 0, count)
        for product, count in zip(products, rows, strict=True)
    ]


def _operands(sites: Sequence[FusedMatmulSite]) -> list[fx.Node]:
    operands: list[fx.Node] = []
    for site in sites:
        operands += (site.padded or site.left, site.right)
    return operands


def _pairs(
    axes: Sequence[tuple[SampleAxis, SampleAxis]],
    operands: Sequence[torch.Tensor],
    batch_size: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return [B, m, T] and [B, T, n] of every site from what `_operands` lists."""
    return [
        sample_major(axes[k], operands[2 * k], operands[2 * k + 1], batch_size)
        for k in range(len(axes))
    ]


def _gram_errors(left: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """The errors of the kernel's products of rows, which are float32."""
    product = left.new_empty(0, dtype=torch.float32)
    return gram_error(product, left.shape[1]), gram_error(product, right.shape[2])


def _square_and_slack(
    sums: torch.Tensor, errors: tuple[float, float], tokens: int, rounding: Rounding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squares and slack from the sums [4, ...] of `ghost_norms`."""
    square, spread, by_left, by_right = sums.unbind(0)
    slack = rounding.spread_slack(spread, tokens)
    return square, slack + errors[0] * by_left + errors[1] * by_right
