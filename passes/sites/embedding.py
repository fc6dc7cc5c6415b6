"""Embedding tables: gradients scattered by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from flashnorm_compile._torch import hint
from flashnorm_compile.passes.batch_axis.values import Batched
from flashnorm_compile.passes.cost import Cost
from flashnorm_compile.passes.layout import SampleAxis, masked_scale
from flashnorm_compile.passes.sites.base import Context, Site, later
from flashnorm_compile.passes.sites.generic import is_zero_fill
from flashnorm_compile.passes.sites.matmul import MatmulSite, sample_major
from flashnorm_compile.passes.sites.rounding import (
    HALF,
    Rounding,
    gram,
    gram_dtype,
    gram_error,
    pair_sum,
    row_norms,
    sum_error,
    weighted_rows,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class _Scatter:
    """rows[token] += gradient, with an optional mask of the tokens that count."""

    tokens: fx.Node
    gradients: fx.Node
    mask: fx.Node | None = None
    padding_idx: int = -1


def _read(node: fx.Node) -> _Scatter | None:
    """Read the forms in which torch writes an embedding's backward."""
    if node.target == aten.embedding_dense_backward.default:
        gradients, tokens, _, padding_idx, scale_by_frequency = node.args
        # Scaling by frequency counts the whole batch's tokens: not a sum over samples.
        return None if scale_by_frequency else _Scatter(tokens, gradients, None, padding_idx)
    if node.target == aten.index_put.default:
        _, indices, values, *accumulate = node.args
        if accumulate != [True] or not is_zero_fill(node.args[0]):
            return None
        return _Scatter(indices[0], values) if len(indices) == 1 else None
    if node.target == aten._unsafe_masked_index_put_accumulate.default:
        _, mask, indices, values = node.args
        if not is_zero_fill(node.args[0]) or len(indices) != 1:
            return None
        return _Scatter(indices[0], values, mask)
    return None


class EmbeddingSite(Site):
    """A scatter of gradient rows [tokens..., d] into a table [V, d] by batched token indices."""

    kind: ClassVar[str] = "embedding"

    def __init__(self, node: fx.Node, context: Context, scatter: _Scatter) -> None:
        super().__init__(node, context)
        self.scatter = scatter
        value = context.analysis[scatter.gradients]
        self.axis = SampleAxis.of(value)
        self.rows = node.meta["val"].shape[0]

    @classmethod
    def match(cls, node: fx.Node, context: Context) -> EmbeddingSite | None:
        """Recognise the site: plain rows, and indices batched as the gradients are."""
        scatter = _read(node)
        if scatter is None or node.meta["val"].ndim != 2:
            return None
        if scatter.tokens.meta["val"].dtype in (torch.bool, torch.uint8):
            return None
        gradients = context.analysis[scatter.gradients]
        tokens = context.analysis[scatter.tokens]
        dims = scatter.gradients.meta["val"].ndim - 1
        if scatter.tokens.meta["val"].ndim != dims or not isinstance(gradients, Batched):
            return None
        *lead, width = scatter.gradients.meta["val"].shape
        tokens_fit = zip(scatter.tokens.meta["val"].shape, lead, strict=True)
        if width != node.meta["val"].shape[1] or any(a not in (1, b) for a, b in tokens_fit):
            return None
        if gradients.dim >= dims or (isinstance(tokens, Batched) and tokens != gradients):
            return None
        if scatter.mask is not None:
            mask, value = context.analysis[scatter.mask], scatter.mask.meta["val"]
            # The mask broadcasts over d, as [tokens..., 1] or [tokens..., d].
            if value.ndim != dims + 1 or (isinstance(mask, Batched) and mask != gradients):
                return None
        return cls(node, context, scatter)

    def per_sample(self) -> fx.Node:
        """Emit [B, V, d]."""

        def code(batch: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
            tokens, gradients = self._sample_major(batch.shape[0], *operands)
            gradients = _wide(gradients)
            samples, _, width = gradients.shape
            table = torch.zeros(
                samples, self.rows, width, dtype=gradients.dtype, device=gradients.device
            )
            return table.scatter_add(1, tokens.unsqueeze(-1).expand_as(gradients), gradients)

        return self._emit(code)

    def weighted(self, weights: fx.Node, before: fx.Node) -> fx.Node:
        """Emit the scatter of the scaled rows."""

        def code(weights: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
            tokens, gradients = self._sample_major(weights.shape[0], *operands)
            gradients = _wide(gradients)
            gradients = masked_scale(SampleAxis(0, 1, 1), gradients, weights, scale=True)
            width = gradients.shape[-1]
            table = torch.zeros(self.rows, width, dtype=gradients.dtype, device=gradients.device)
            return torch.ops.aten.index_put(
                table, [tokens.reshape(-1)], gradients.reshape(-1, width), True
            )

        return self.context.emit(code, weights, *self._operands(), before=before, like=self.node)

    @property
    def rounding(self) -> Rounding:
        """The rounding of ``weighted``."""
        return Rounding.of_scatter(self.scatter.gradients.meta["val"])

    def ghost(self) -> tuple[fx.Node, fx.Node]:
        """Emit ‖·‖² = Σ_v ‖Σ_{t: token_t = v} g_t‖²."""

        def code(
            batch: torch.Tensor, *operands: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            tokens, gradients = self._sample_major(batch.shape[0], *operands)
            (sums,), (norms,) = _by_token(tokens, gradients)
            # The squared spread, of each row of the table on its own.
            spread = pair_sum(norms.square())
            slack = self.rounding.spread_slack(spread.sqrt(), tokens.shape[1])
            return pair_sum(sums.square()), slack + sum_error(sums) * spread

        return self._emit(code)

    def inner_product_cost(self, other: Site) -> Cost | None:
        """Know other scatters and output heads."""
        if isinstance(other, EmbeddingSite):
            return self._sums_cost(self._tokens_per_sample() + other._tokens_per_sample())
        if isinstance(other, MatmulSite) and other.node.meta["val"].ndim == 2:
            return self._gram_cost(hint(other.left.meta["val"].shape[-1]) / self.context.batch_size)
        return None

    def samples_product_cost(self) -> Cost:
        """Gather a row per token."""
        return self.context.device.move(8.0 * hint(self.scatter.gradients.meta["val"].numel()))

    def samples_product(self, samples: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Emit Σ_t ⟨samples[token_t], g_t⟩."""

        def code(
            batch: torch.Tensor, samples: torch.Tensor, *operands: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            tokens, gradients = self._sample_major(batch.shape[0], *operands)
            rows = samples.gather(1, tokens.unsqueeze(-1).expand_as(gradients))
            product = rows.double() * gradients.double()
            norms = row_norms(rows, -1) * row_norms(gradients, -1)
            return pair_sum(product), sum_error(product) * pair_sum(norms.double())

        return self.context.emit(  # type: ignore[no-any-return]
            code,
            self.context.batch,
            samples,
            *self._operands(),
            before=later(self.node, samples.next),
        )

    def inner_product(
        self, other: Site, transposed: bool, other_transposed: bool
    ) -> tuple[fx.Node, fx.Node]:
        """Emit the inner product with another scatter, or with an output head's product."""
        if isinstance(other, EmbeddingSite):
            assert transposed == other_transposed
            return self._with_embedding(other)
        assert isinstance(other, MatmulSite)
        return self._with_matmul(other, transposed != other_transposed)

    def materialize_cost(self) -> Cost:
        """Clear, scatter into and read a table per sample."""
        kept = 4.0 * self.context.batch_size * hint(self.node.meta["val"].numel())
        return self.context.device.move(kept, kept, kept, kept) + Cost(kept=kept)

    def ghost_cost(self) -> Cost:
        """Clear, add to and read a row per token."""
        kept = 4.0 * hint(self.scatter.gradients.meta["val"].numel())
        return self._sums_cost(self._tokens_per_sample()) + Cost(kept=kept)

    def _sums_cost(self, tokens: float) -> Cost:
        rows = 4.0 * self.context.batch_size * tokens * hint(self.node.meta["val"].shape[1])
        return self.context.device.move(2.0 * rows, 5.0 * rows, 2.0 * rows)

    def _gram_cost(self, others: float) -> Cost:
        device, gradients = self.context.device, self.scatter.gradients.meta["val"]
        width, tokens = hint(self.node.meta["val"].shape[1]), self._tokens_per_sample()
        batch = self.context.batch_size
        written = 4.0 * batch * tokens * others
        read = 4.0 * batch * (tokens + others) * width
        flops = 2.0 * batch * tokens * others * width
        product = device.multiply(flops, gram_dtype(gradients), read + written)
        return product + device.move(2.0 * written)

    def _tokens_per_sample(self) -> float:
        return hint(self.scatter.tokens.meta["val"].numel()) / self.context.batch_size

    def _with_embedding(self, other: EmbeddingSite) -> tuple[fx.Node, fx.Node]:
        count = len(self._operands())

        def code(
            batch: torch.Tensor, *operands: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            tokens, gradients = self._sample_major(batch.shape[0], *operands[:count])
            tokens2, gradients2 = other._sample_major(batch.shape[0], *operands[count:])
            sums, norms = _by_token(torch.cat([tokens, tokens2], 1), gradients, gradients2)
            product = sums[0] * sums[1]
            return pair_sum(product), sum_error(product) * pair_sum(norms[0] * norms[1])

        return self.context.emit(  # type: ignore[no-any-return]
            code,
            self.context.batch,
            *self._operands(),
            *other._operands(),
            before=later(self.node, other.node),
        )

    def _with_matmul(
        self, other: MatmulSite, other_transposed: bool
    ) -> tuple[fx.Node, fx.Node]:
        """Σ_{s,t} head_gradient[t, token_s]·⟨activation_t, g_s⟩: columns gathered by token."""

        def code(
            batch: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *operands: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            tokens, gradients = self._sample_major(batch.shape[0], *operands)
            axes = other.left_axis, other.right_axis
            left, right = sample_major(axes, left, right, batch.shape[0])
            if other_transposed:
                left, right = right.mT, left.mT
            # left [B, V, T], right [B, T, d]; tokens [B, S], gradients [B, S, d].
            index = tokens.unsqueeze(-1).expand(*tokens.shape, left.shape[-1])
            gathered = left.gather(1, index)
            product = gram(gradients, right.mT)
            norms = row_norms(gradients, -1), row_norms(right, -1)
            error = gram_error(product, gradients.shape[-1])
            square = pair_sum((gathered * product).sum(-1))
            return square, error * pair_sum(weighted_rows(gathered, *norms))

        return self.context.emit(  # type: ignore[no-any-return]
            code,
            self.context.batch,
            other.left if other_transposed else (other.padded or other.left),
            other.right,
            *self._operands(),
            before=later(self.node, other.node),
        )

    def _operands(self) -> list[fx.Node]:
        scatter = self.scatter
        operands = [scatter.tokens, scatter.gradients]
        return operands if scatter.mask is None else [*operands, scatter.mask]

    def _emit(self, code: Callable[..., Any]) -> Any:
        return self.context.emit(code, self.context.batch, *self._operands(), before=self.node)

    def _sample_major(
        self,
        batch_size: int,
        tokens: torch.Tensor,
        gradients: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens [B, T], non-negative, and gradient rows [B, T, d]."""
        zero = torch.zeros((), dtype=gradients.dtype, device=gradients.device)
        if mask is not None:
            gradients = torch.where(mask, gradients, zero)
        if self.scatter.padding_idx >= 0:
            padding = (tokens == self.scatter.padding_idx).unsqueeze(-1)
            gradients = torch.where(padding, zero, gradients)
        tokens = torch.where(tokens < 0, tokens + self.rows, tokens)
        # A masked row may carry any index; it adds zero wherever it lands.
        tokens = tokens.clamp(0, self.rows - 1)
        tokens = tokens.expand(gradients.shape[:-1])
        width = gradients.shape[-1]
        tokens = self.axis.to_front(tokens, batch_size).reshape(batch_size, -1)
        return tokens, self.axis.to_front(gradients, batch_size).reshape(batch_size, -1, width)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in HALF else x


def _by_token(
    tokens: torch.Tensor, *parts: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Add up each sample's rows of equal tokens, without a table as large as the vocabulary.

    Args:
        tokens: [B, T], those of all parts one after another.
        parts: rows [B, T_k, d]; the T_k make up T.

    Returns:
        For each part, float64: its sums [B, T, d] and the sums of its rows' norms [B, T], of the
        first token, the second, ... that differs from those before it in order.
    """
    order = tokens.argsort(dim=1)
    ordered = tokens.gather(1, order)
    differs = ordered[:, 1:] != ordered[:, :-1]
    ranks = torch.nn.functional.pad(differs.cumsum(1), (1, 0))
    places = torch.zeros_like(ranks).scatter(1, order, ranks)
    sums, norms = [], []
    for rows, at in zip(parts, places.split([x.shape[1] for x in parts], 1), strict=True):
        table = rows.new_zeros(*tokens.shape, rows.shape[-1], dtype=torch.float64)
        index = at.unsqueeze(-1).expand_as(rows)
        sums.append(table.scatter_add(1, index, rows.double()))
        lengths = rows.new_zeros(tokens.shape, dtype=torch.float64)
        norms.append(lengths.scatter_add(1, at, row_norms(rows, -1).double()))
    return sums, norms
