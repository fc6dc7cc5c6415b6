"""How far a norm found without the gradient may be below what is summed, and what is added for it.

A ghost norm is n² = Σ_{t,s} (a_t·a_s)(g_t·g_s). Where a sample's tokens cancel, the terms are far
larger than their sum, and rounding can leave nothing, or less, of a norm that is not small. The
weighted sum Σ_t (c g_t) a_tᵀ rounds as well, by errors that do not cancel. Let

    S = Σ_t ‖a_t‖‖g_t‖ ≥ n             (the spread; a sum over tokens, not pairs of tokens)
    |computed n² - n²| ≤ E              (Gram products, and the sum over pairs)
    ‖sum - c·gradient‖ ≤ c·R            (what one sample adds to the released sum)

Then for any k > 0, by Cauchy-Schwarz on (n, R) and (1, 1/√k),

    ‖sum‖² ≤ c²(n + R)² ≤ c²(1 + 1/k)(n² + kR²) ≤ c²(1 + 1/k)(computed n² + E + kR²).

``slack`` is an upper bound of E + kR². The norm that clips is

    max(n², 0) + max(slack - τn², 0)  ≥  (1 - τ)(n² + slack)

so no contribution exceeds C by more than a factor √((1 + 1/k)/(1 - τ)), whatever the data, and a
norm is left as computed where n² ≥ κS², κ = slack/(τS²), which is where it can be trusted.

    Gram products                E: those of float32 and float64 are made in float64, by which also
                                 TF32 cannot touch them: (p + d)·2⁻⁵²·S². Half precision on a GPU:
                                 products are exact and added with an error u each, see below: an
                                 error of d·u‖a_t‖‖a_s‖ in each a_t·a_s, so in all
                                 d·u·Σ‖a_t‖‖a_s‖|g_t·g_s| and the same with g.
    sums by token                E: float64, (T + d)·2⁻⁵²·S².
    a materialised site          E: none in float64. R = 3·2⁻²⁴·‖g‖ of its entries, which are
                                 weighted and added to those of other sites: these may cancel.
    sum over T tokens            R = (T + 2)·u·S, sequential float32, or by tensor cores
    operands rounded to TF32     R = 2⁻¹⁰·S: 2⁻¹¹ for each operand; twice that if cut off
    c∘g rounded to bfloat16      R² = 2⁻¹⁶·Σ ‖g_t‖‖g_s‖|a_t·a_s|: 2⁻⁸ for each entry

The last two are coarse: k = 32, τ = 2⁻⁵, so at most 3.2 % above C, while n² ≥ S²/64 (bfloat16) or
S²/1024 (TF32) stays as computed: 64 or 1024 tokens with orthogonal gradients. Otherwise k = 256,
τ = 2⁻¹⁰: at most 0.25 % above C, and 2⁻¹¹ from what is computed; 512 orthogonal tokens stay as
they are, 2048 raise n by 0.4 %. All this in the worst case; the rounding errors of ordinary data
cancel, and its sums exceed C by less than 1e-6, or in bfloat16 by 0.4 %, for a single token.

An addition of float32 errs by u = 2⁻²⁴ of the largest sum. Tensor cores add k products to a sum at
once: all are cut off j bits below float32's last of the largest of them, and so is the result at
that last bit, so that each product costs ((k + 1)·2⁻ʲ + 1)/k·2⁻²³. With k = 4, j = 0 (Volta,
Turing), k = 8, j = 1 (Ampere, Ada) and k = 16, j = 2 (Hopper, data centres' Blackwell) that is less
than u = 2⁻²², 2⁻²³ and 2⁻²⁴ (Fasi et al. 2021, doi 10.7717/peerj-cs.330; Khattak and Mikaitis 2025,
arXiv 2512.07004).

That a sum is added up token after token, with nothing else between, is true of samples whose rows
lie together; what other samples add to the rounding is bounded by their own sums, far below noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashnorm_compile.passes.emit import half_matmul

HALF = (torch.bfloat16, torch.float16)
# Squares below it are flushed to zero: a row norm is never less than its true value, nor a Gram
# product's underflow more than its allowance.
_FLOOR = 2.0**-100
# Of tensor cores, by major compute capability. What is not listed counts as Ampere's.
_ADDITION_ERRORS = {7: 2.0**-22, 9: 2.0**-24, 10: 2.0**-24}


@dataclass(frozen=True)
class Rounding:
    """The errors of a site's weighted sum, relative to the spread S.

    Attributes:
        operands: R/S of operands that the product itself rounds (TF32).
        scaled: relative error of the entries that are rounded once they are scaled, or 0.
        unit: u, the relative error of an addition.
    """

    operands: float
    scaled: float
    unit: float

    @classmethod
    def of_matmul(cls, value: torch.Tensor) -> Rounding:
        """Of ``half_matmul`` with one scaled operand."""
        if value.dtype == torch.float64:
            return cls(0.0, 0.0, 2.0**-53)
        if value.dtype == torch.bfloat16:
            return cls(0.0, 2.0**-8, addition_error(value))
        return cls(_float32_operands(value), 0.0, addition_error(value))

    @classmethod
    def of_convolution(cls, value: torch.Tensor) -> Rounding:
        """Of a float32 convolution: cuDNN uses TF32 unless told otherwise."""
        if value.dtype == torch.float64:
            return cls(0.0, 0.0, 2.0**-53)
        operands = 2.0**-10 if value.is_cuda else _float32_operands(value)
        return cls(operands, 0.0, addition_error(value))

    @classmethod
    def of_exact_products(cls, value: torch.Tensor) -> Rounding:
        """Of sums over products that are weighted once made: of 16 bits on a GPU, exact ones."""
        if not value.is_cuda:
            return cls(_float32_operands(value), 0.0, 2.0**-24)
        # Triton's products in TF32 drop the bits that cuBLAS rounds.
        return cls(0.0 if value.dtype in HALF else 2.0**-9, 0.0, addition_error(value))

    @classmethod
    def of_scatter(cls, value: torch.Tensor) -> Rounding:
        """Of additions in float32."""
        return cls(0.0, 0.0, 2.0**-53 if value.dtype == torch.float64 else 2.0**-24)

    @property
    def coarse(self) -> bool:
        """Whether operands are rounded to less than float32."""
        return max(self.operands, self.scaled) > 0

    @property
    def k(self) -> float:
        """How much more R² is held against n²."""
        return 32.0 if self.coarse else 256.0

    @property
    def tolerance(self) -> float:
        """τ: the slack, relative to n², that is left out."""
        return 2.0**-5 if self.coarse else 2.0**-10

    def spread_slack(self, spread: torch.Tensor, tokens: int | torch.SymInt) -> torch.Tensor:
        """kR² of the sum over tokens and of the product's operands, from S."""
        steps: Any = tokens if isinstance(tokens, int) else spread.new_full((), tokens)
        error = (steps + 2) * self.unit + self.operands
        return spread.square() * (error * error * self.k)

    @property
    def scaled_slack(self) -> float:
        """kR² of rounding the scaled operand, relative to Σ ‖g_t‖‖g_s‖|a_t·a_s|."""
        return self.k * self.scaled**2


def addition_error(value: torch.Tensor) -> float:
    """u, of sums over products on the device of a tensor; one not there counts as an H100."""
    if not value.is_cuda:
        return 2.0**-24
    there = torch.cuda.is_available()
    major, _ = torch.cuda.get_device_capability(value.device) if there else (9, 0)
    return _ADDITION_ERRORS.get(major, 2.0**-23)


def _float32_operands(value: torch.Tensor) -> float:
    """TF32 is assumed on a GPU: the setting may change after compilation."""
    if value.is_cuda:
        return 2.0**-10
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        # It was set by torch.backends.mkldnn, which this function of torch's does not speak of.
        return 2.0**-7
    return {"highest": 0.0, "high": 2.0**-10}.get(precision, 2.0**-7)


def row_norms(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Norms along a dim, in float32 or wider, rather above than below."""
    wide = x.float() if x.dtype in HALF else x
    return (wide.square().sum(dim) + _FLOOR).sqrt()


def squares_above(x: torch.Tensor) -> torch.Tensor:
    """Squared norms [B] of x [B, ...] in float32, rather above than below."""
    return x.float().square().reshape(x.shape[0], -1).sum(1) * (1 + 2.0**-12) + _FLOOR


def gram(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[..., T, d] x [..., d, S]: float32 from half precision on a GPU, else float64."""
    if left.is_cuda and left.dtype in HALF and left.dtype == right.dtype:
        return half_matmul(left, right)
    return torch.matmul(left.double(), right.double())


def gram_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the operands that ``gram`` multiplies."""
    return x.dtype if x.is_cuda and x.dtype in HALF else torch.float64


def gram_operand(x: torch.Tensor) -> torch.Tensor:
    """What ``gram`` reads of x: one copy for the product with its own transpose, not two."""
    return x.to(gram_dtype(x))


def gram_error(product: torch.Tensor, length: int | torch.SymInt) -> float:
    """The largest error of ``gram`` relative to the two rows' norms.

    ``length`` is the rows' length. That of the sum over pairs of tokens is put on top.
    """
    length = length if isinstance(length, int) else length.node.hint or 2**16
    if product.dtype == torch.float64:
        return (length + 64) * 2.0**-52
    return length * addition_error(product) + 2.0**-19


def sum_error(terms: torch.Tensor) -> float:
    """The largest error of inner products [B, T, d] of rows that are float64 sums over tokens.

    Relative to the rows' norms before they were added up.
    """
    length = sum(size if isinstance(size, int) else size.node.hint or 2**16
                 for size in terms.shape[1:])
    return (length + 64) * 2.0**-52


def pair_sum(x: torch.Tensor) -> torch.Tensor:
    """Σ over all but the samples: [B, ...] → [B]."""
    return x.reshape(x.shape[0], -1).sum(1)


def ghost_square(
    left: torch.Tensor, right: torch.Tensor, rounding: Rounding, *, scale_left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """‖L_i R_i‖² and its slack, [B] each, from [B, ..., m, T] and [B, ..., T, n].

    Products of the dims between B and the last two are apart, each with its own spread.
    """
    tokens = left.shape[-1]
    if tokens == 1:
        first, second = _own_product(left, -2).unsqueeze(-1), _own_product(right, -1).unsqueeze(-1)
    else:
        wide_left, wide_right = gram_operand(left), gram_operand(right)
        first, second = gram(wide_left.mT, wide_left), gram(wide_right, wide_right.mT)
    by_left, by_right = gram_error(first, left.shape[-2]), gram_error(second, right.shape[-1])
    a, g = _gram_norms(first, by_left), _gram_norms(second, by_right)
    spreads = (a * g).sum(-1)
    slack = pair_sum(rounding.spread_slack(spreads, tokens))
    square = pair_sum((first * second).sum(-1))
    if tokens == 1 or (first.dtype == torch.float64 and rounding.scaled == 0.0):
        whole = by_left + by_right + rounding.scaled_slack
        return square, slack + whole * pair_sum(spreads.square())
    if scale_left:
        by_left += rounding.scaled_slack
    else:
        by_right += rounding.scaled_slack
    error = by_left * weighted_rows(second, a, a) + by_right * weighted_rows(first, g, g)
    return square, slack + pair_sum(error)


def _gram_norms(product: torch.Tensor, error: float) -> torch.Tensor:
    """Norms of the rows of which [..., T, T] holds the products, rather above than below.

    The diagonal is off by ``error`` of itself at most, and is there already: to read the rows once
    more would cost as much as their product.
    """
    return (product.diagonal(dim1=-2, dim2=-1) * (1 + 2 * error) + _FLOOR).sqrt()


def _own_product(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x·x along a dim, as precise as ``gram``."""
    wide = x.float() if x.is_cuda and x.dtype in HALF else x.double()
    return wide.square().sum(dim) + _FLOOR


def ghost_product(
    left: torch.Tensor, right: torch.Tensor, left2: torch.Tensor, right2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """⟨L_i R_i, L'_i R'_i⟩ and its largest error, [B] each."""
    first = gram(gram_operand(left).mT, gram_operand(left2))
    second = gram(gram_operand(right), gram_operand(right2).mT)
    by_left = gram_error(first, left.shape[-2]) * weighted_rows(
        second, row_norms(left, -2), row_norms(left2, -2)
    )
    by_right = gram_error(second, right.shape[-1]) * weighted_rows(
        first, row_norms(right, -1), row_norms(right2, -1)
    )
    return pair_sum((first * second).sum(-1)), pair_sum(by_left + by_right)


def weighted_rows(pairs: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Σ_s |pairs[t, s]|·x_t·y_s, [..., T, S] → [..., T].

    All that is summed over pairs goes over s first: on a GPU one kernel reads them once for all.
    """
    return (pairs.abs() * y.unsqueeze(-2)).sum(-1) * x


def materialized_square(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared norms [B] of per-sample gradients to which others are added, and their slack."""
    square = pair_sum(samples.double().square())
    return square, square * (Rounding(0.0, 0.0, 2.0**-24).k * (3 * 2.0**-24) ** 2)


def bounded_square(
    squares: Sequence[torch.Tensor],
    slacks: Sequence[torch.Tensor],
    products: Sequence[torch.Tensor],
    product_slacks: Sequence[torch.Tensor],
    tolerance: float,
) -> torch.Tensor:
    """The squared norm [B] of a sum of sites that no contribution exceeds, in float32.

    Args:
        squares: of every site.
        slacks: of every site. The sites' errors add up, so slacks add up as norms do.
        products: inner products of every two sites.
        product_slacks: the largest errors of those.
        tolerance: τ.
    """
    square = sum(squares) + 2 * sum(products)
    slack = slacks[0]
    if products:
        slack = sum(x.sqrt() for x in slacks).square() + 2 * sum(product_slacks)
    # A select between the two would drop NaN; these keep it.
    return (square.clamp(min=0) + (slack - tolerance * square).clamp(min=0)).float()
