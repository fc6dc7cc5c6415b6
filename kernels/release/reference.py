"""The specification of the release, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm_compile.kernels.noise import reference


def release(
    samples: Tensor,
    weights: Tensor,
    key: Tensor,
    scalars: Tensor,
    stream: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return ``((Σ_b weights[b]·samples[b] + noise_scale·z) · inv_expected_batch_size)``.

    Arguments and result as in `op.release`, for one gradient.
    """
    return reference.add_noise(weighted_sum(samples, weights), key, scalars, stream, out_dtype)


def weighted_sum(samples: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_b weights[b]·samples[b] in float32 or wider.

    Samples of weight 0 are left out, not multiplied: they may hold NaN or infinity.

    Args:
        samples: [B, ...], floating.
        weights: [B] float32.
    """
    weights = weights.view(-1, *(1,) * (samples.dim() - 1))
    zero = torch.zeros((), dtype=weights.dtype, device=weights.device)
    return torch.where(weights == 0, zero, samples * weights).sum(0)
