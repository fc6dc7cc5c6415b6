"""The specification of sums over two Gram matrices, in plain PyTorch and float64.

With rows l_t of left_b (its columns) and r_t of right_b, the gradient of a linear layer's weight is
left_b·right_b = Σ_t l_t r_tᵀ, so that (Goodfellow 2015, arXiv 1510.01799)

    ‖left_b·right_b‖² = Σ_{t,s} (l_t·l_s)(r_t·r_s)

The other sums weigh errors of l_t·l_s and of r_t·r_s that are relative to the rows' norms: see
``passes/sites/rounding.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to squares: rows whose squares are flushed to zero have a norm, too.
FLOOR = 2.0**-100


def ghost_norm(left: Tensor, right: Tensor, left_error: float, right_error: float) -> Tensor:
    """Return the four sums [4, B] of `op.ghost_norm`, in float64."""
    left, right = left.double(), right.double()
    a, g = left.mT @ left, right @ right.mT
    left_norms, right_norms = _norms(a, left_error), _norms(g, right_error)
    product, by_left, by_right = _sums(a, g, left_norms, right_norms, left_norms, right_norms)
    return torch.stack([product, (left_norms * right_norms).sum(1), by_left, by_right])


def ghost_product(
    left: Tensor,
    right: Tensor,
    left2: Tensor,
    right2: Tensor,
    left_norms: Tensor,
    right_norms: Tensor,
    left2_norms: Tensor,
    right2_norms: Tensor,
) -> Tensor:
    """Return the three sums [3, B] of `op.ghost_product`, in float64."""
    a = left.double().mT @ left2.double()
    g = right.double() @ right2.double().mT
    norms = (x.double() for x in (left_norms, right_norms, left2_norms, right2_norms))
    return torch.stack(_sums(a, g, *norms))


def _norms(gram: Tensor, error: float) -> Tensor:
    """Return the norms of rows from their products, rather above than below.

    The products may be off by ``error`` of themselves.
    """
    return (gram.diagonal(dim1=1, dim2=2) * (1 + 2 * error) + FLOOR).sqrt()


def _sums(
    a: Tensor, g: Tensor, left: Tensor, right: Tensor, left2: Tensor, right2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ a·g, Σ |g|·left·left2 and Σ |a|·right·right2 over all pairs of rows, [B] each."""
    return (
        (a * g).sum((1, 2)),
        (g.abs() * left.unsqueeze(2) * left2.unsqueeze(1)).sum((1, 2)),
        (a.abs() * right.unsqueeze(2) * right2.unsqueeze(1)).sum((1, 2)),
    )
