"""The specification of the weighted gradient, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_gradient(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_b weights[b]·(left_b @ right_b) over the samples whose weight is not 0.

    Args:
        left: [B, m, T], floating.
        right: [B, T, n], floating.
        weights: [B] float32.

    Returns:
        [m, n] in float32 or wider.
    """
    dtype = result_dtype(left)
    weights = weights.to(dtype).view(-1, 1, 1)
    zero = torch.zeros((), dtype=dtype, device=left.device)
    # A select, not a product: 0·NaN is NaN.
    left = torch.where(weights == 0, zero, left.to(dtype) * weights)
    right = torch.where(weights == 0, zero, right.to(dtype))
    return torch.matmul(left, right).sum(0)


def result_dtype(operand: Tensor) -> torch.dtype:
    """Return the dtype of sums over products with the operand: float32, or float64 for float64."""
    return torch.promote_types(operand.dtype, torch.float32)
