"""The specification of products by sample and of their squared norms, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def flash_norm(left: Tensor, right: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Return ``‖left_b·right_b‖²`` and, if asked for, ``‖Σ_t left_b[:, t]‖²`` for every sample.

    Arguments and results as in `op.flash_norm`.
    """
    left, right = left.float(), right.float()
    squares = (left @ right).square().sum((1, 2))
    bias_squares = left.sum(2).square().sum(1)
    return squares, bias_squares if bias else bias_squares.new_empty(0)


def materialize_norm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``left_b·right_b`` rounded to ``out_dtype``, and the squared norm of what was rounded.

    Arguments and results as in `op.materialize_norms`, of one layer.
    """
    samples = (left.float() @ right.float()).to(out_dtype)
    return samples, samples.float().square().sum((1, 2))
