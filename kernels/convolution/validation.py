"""What the ops expect of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def validate(
    op: str,
    gradient: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    """Raise ValueError unless the arguments are what `op.convolution_samples` documents."""
    for name, x, shape in (
        ("gradient", gradient, "[B, O, Ho, Wo]"),
        ("input", input, "[B, C, H, W]"),
    ):
        if not x.dtype.is_floating_point or x.dim() != 4:
            raise ValueError(f"{op}: {name} is {x.dtype}, {x.dim()}-d; expected floating {shape}")
    if gradient.dtype != input.dtype or gradient.device != input.device:
        raise ValueError(
            f"{op}: gradient is {gradient.dtype} on {gradient.device} and input {input.dtype} on "
            f"{input.device}; expected one dtype and device"
        )
    for name, numbers, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(numbers) != 2 or min(numbers) < least:
            raise ValueError(f"{op}: {name} is {numbers}; expected two numbers, {least} or more")
    # Only sizes that are known: a comparison of symbolic ones would fix them.
    if _differ(gradient.shape[0], input.shape[0]):
        raise ValueError(
            f"{op}: gradient holds {gradient.shape[0]} samples and input {input.shape[0]}; "
            "expected the same number"
        )
    for name, channels in (("gradient", gradient.shape[1]), ("input", input.shape[1])):
        if groups < 1 or (isinstance(channels, int) and channels % groups):
            raise ValueError(f"{op}: {channels} channels of {name} in {groups} groups")
    for d in range(2):
        positions, size = gradient.shape[2 + d], input.shape[2 + d]
        if isinstance(positions, int) and isinstance(size, int) and positions > 0:
            last = (positions - 1) * stride[d] + (kernel_size[d] - 1) * dilation[d]
            if last >= size + 2 * padding[d]:
                raise ValueError(
                    f"{op}: {positions} positions of gradient reach element {last} of an input of "
                    f"{size} with padding {padding[d]} (dim {2 + d})"
                )


def validate_dtype(out_dtype: torch.dtype) -> None:
    """Raise ValueError unless samples can be stored in this dtype."""
    if not out_dtype.is_floating_point:
        raise ValueError(
            f"convolution_samples: out_dtype is {out_dtype}; expected a real floating dtype"
        )


def validate_weights(weights: Tensor, gradient: Tensor) -> None:
    """Raise ValueError unless there is a weight for every sample."""
    if weights.dtype != torch.float32 or weights.dim() != 1:
        raise ValueError(
            f"convolution_weighted: weights is {weights.dtype} {list(weights.shape)}; "
            "expected torch.float32 [B]"
        )
    if _differ(weights.shape[0], gradient.shape[0]):
        raise ValueError(
            f"convolution_weighted: {weights.shape[0]} weights for {gradient.shape[0]} samples"
        )
    if weights.device != gradient.device:
        raise ValueError(
            f"convolution_weighted: weights is on {weights.device} and gradient on "
            f"{gradient.device}; expected one device"
        )


def _differ(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    return isinstance(left, int) and isinstance(right, int) and left != right
