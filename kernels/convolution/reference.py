"""The specification of per-sample gradients of a convolution's weight, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def samples(
    gradient: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the gradient of every sample, in float32 (float64 for float64 operands).

        g_b[o, c, i, j] = Σ_hw gradient[b, o, h, w] · x_b[c', h·s_h + i·d_h, w·s_w + j·d_w]

    with x the input within its padding, and c' the c-th channel of o's group (Rochette et al. 2019,
    arXiv 1912.06015). Only the gradient's positions count: the input may reach further.

    Args:
        gradient: [B, O, Ho, Wo].
        input: [B, C, H, W], of the same dtype.
        kernel_size: of the weight, as the next ones in two dims.
        stride: s.
        padding: zeros on both sides of each dim.
        dilation: d.
        groups: parts of the channels, the i-th of O with the i-th of C.

    Returns:
        [B, O, C/groups, *kernel_size].
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    height, width = gradient.shape[2:]
    outer = gradient.to(dtype).unflatten(1, (groups, gradient.shape[1] // groups))
    inner = functional.pad(input.to(dtype), [p for p in reversed(padding) for _ in range(2)])
    inner = inner.unflatten(1, (groups, input.shape[1] // groups))
    taps = []
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            rows = inner[..., i * dilation[0] :: stride[0], :][..., :height, :]
            window = rows[..., j * dilation[1] :: stride[1]][..., :width]
            taps.append(torch.einsum("bgohw,bgchw->bgoc", outer, window))
    return torch.stack(taps, dim=-1).flatten(1, 2).unflatten(-1, tuple(kernel_size))


def squares(samples: Tensor) -> Tensor:
    """Return the squared norm of every sample, float32 [B]."""
    wide = samples.to(torch.promote_types(samples.dtype, torch.float32))
    return wide.square().flatten(1).sum(1).float()


def weighted(samples: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_b weights[b]·samples[b]. Samples of weight 0 are left out, whatever they hold."""
    weights = weights.view(-1, *(1,) * (samples.dim() - 1))
    zero = torch.zeros((), dtype=samples.dtype, device=samples.device)
    return torch.where(weights == 0, zero, samples * weights).sum(0)
