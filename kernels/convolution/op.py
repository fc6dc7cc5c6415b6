"""The custom ops ``flashnorm::convolution_*``: gradients of a 2-d convolution's weight, by sample.

All take the gradient of a convolution's output, its input and its geometry. Products of 16-bit
operands are exact and summed in float32. Float32 operands are multiplied in float32, or in TF32
where ``torch.backends.cuda.matmul.allow_tf32`` says so at the time of the call. Float64 operands,
and the CPU, are left to the composition in `reference`. A transposed convolution's weight gets its
gradients from the same ops, with gradient and input exchanged.

On a GPU, operands whose channels lie side by side (channels_last) are read as they are. Others are
copied to that layout first, but for row-major ones of a 1x1 convolution and row-major gradients
whose width is a power of 2. Where a group has less than 8 channels, or no multiple of 16 bytes,
elements are read one by one; a depthwise convolution leaves the matrix units all but empty. There,
and for float32 without TF32, a composition of unfolded patches may be faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm_compile.kernels.convolution import reference
from flashnorm_compile.kernels.convolution.validation import (
    validate,
    validate_dtype,
    validate_weights,
)


@torch.library.custom_op("flashnorm::convolution_samples", mutates_args=())
def convolution_samples(
    gradient: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the weight's gradient of every sample (see `reference.samples`) and its square.

    Args:
        gradient: of the output, [B, O, Ho, Wo], floating; any strides.
        input: [B, C, H, W], of the same dtype; any strides. It may reach further than the positions
            of ``gradient``, but not less far.
        kernel_size: of the weight: two numbers, as the next ones.
        stride: of the convolution.
        padding: zeros on both sides of each dim.
        dilation: distance of the kernel's elements.
        groups: divides C and O.
        out_dtype: dtype of the gradients.

    Returns:
        The gradients [B, O, C/groups, *kernel_size], row-major, and the squared norms of their
        values as stored, float32 [B].

    Raises:
        ValueError: an argument has the wrong dtype, shape or range.
    """
    geometry = (kernel_size, stride, padding, dilation, groups)
    validate("convolution_samples", gradient, input, *geometry)
    validate_dtype(out_dtype)
    samples = reference.samples(gradient, input, *geometry).to(out_dtype)
    return samples, reference.squares(samples)


@convolution_samples.register_fake
def _(
    gradient: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    geometry = (kernel_size, stride, padding, dilation, groups)
    validate("convolution_samples", gradient, input, *geometry)
    validate_dtype(out_dtype)
    shape = (gradient.shape[1], input.shape[1] // groups, *kernel_size)
    samples = gradient.new_empty((gradient.shape[0], *shape), dtype=out_dtype)
    return samples, gradient.new_empty(gradient.shape[0], dtype=torch.float32)


@convolution_samples.register_kernel("cuda")
def _(
    gradient: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    geometry = (kernel_size, stride, padding, dilation, groups)
    validate("convolution_samples", gradient, input, *geometry)
    validate_dtype(out_dtype)
    if gradient.dtype == torch.float64:
        samples = reference.samples(gradient, input, *geometry).to(out_dtype)
        return samples, reference.squares(samples)
    # Imported here, as below: the package must import where Triton is not installed.
    from flashnorm_compile.kernels.convolution import launch

    return launch.convolution_samples(gradient, input, *geometry, out_dtype)


@torch.library.custom_op("flashnorm::convolution_norm", mutates_args=())
def convolution_norm(
    gradient: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return the squared norms of the weight's gradients by sample, without storing these.

    Args:
        gradient: as in `convolution_samples`, like all others.
        input: [B, C, H, W].
        kernel_size: two numbers.
        stride: two numbers.
        padding: two numbers.
        dilation: two numbers.
        groups: divides C and O.

    Returns:
        float32 [B].

    Raises:
        ValueError: an argument has the wrong dtype, shape or range.
    """
    geometry = (kernel_size, stride, padding, dilation, groups)
    validate("convolution_norm", gradient, input, *geometry)
    return reference.squares(reference.samples(gradient, input, *geometry))


@convolution_norm.register_fake
def _(
    gradient: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = (kernel_size, stride, padding, dilation, groups)
    validate("convolution_norm", gradient, input, *geometry)
    return gradient.new_empty(gradient.shape[0], dtype=torch.float32)


@convolution_norm.register_kernel("cuda")
def _(
    gradient: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = (kernel_size, stride, padding, dilation, groups)
    validate("convolution_norm", gradient, input, *geometry)
    if gradient.dtype == torch.float64:
        return reference.squares(reference.samples(gradient, input, *geometry))
    from flashnorm_compile.kernels.convolution import launch

    return launch.convolution_norm(gradient, input, *geometry)


@torch.library.custom_op("flashnorm::convolution_weighted", mutates_args=())
def convolution_weighted(
    gradient: Tensor,
    input: Tensor,
    weights: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return Σ_b weights[b]·g_b, with g_b the weight's gradient of sample b.

    Nothing is rounded to 16 bits before the sum. Samples of weight 0 are left out, whatever they
    hold.

    Args:
        gradient: as in `convolution_samples`, like all but the next ones.
        input: [B, C, H, W].
        weights: float32 [B].
        kernel_size: two numbers.
        stride: two numbers.
        padding: two numbers.
        dilation: two numbers.
        groups: divides C and O.

    Returns:
        float32 [O, C/groups, *kernel_size]; float64 for float64 operands.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range.
    """
    geometry = (kernel_size, stride, padding, dilation, groups)
    validate("convolution_weighted", gradient, input, *geometry)
    validate_weights(weights, gradient)
    return reference.weighted(reference.samples(gradient, input, *geometry), weights)


@convolution_weighted.register_fake
def _(
    gradient: Tensor,
    input: Tensor,
    weights: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = (kernel_size, stride, padding, dilation, groups)
    validate("convolution_weighted", gradient, input, *geometry)
    validate_weights(weights, gradient)
    shape = (gradient.shape[1], input.shape[1] // groups, *kernel_size)
    return gradient.new_empty(shape, dtype=torch.promote_types(gradient.dtype, torch.float32))


@convolution_weighted.register_kernel("cuda")
def _(
    gradient: Tensor,
    input: Tensor,
    weights: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = (kernel_size, stride, padding, dilation, groups)
    validate("convolution_weighted", gradient, input, *geometry)
    validate_weights(weights, gradient)
    if gradient.dtype == torch.float64:
        return reference.weighted(reference.samples(gradient, input, *geometry), weights)
    from flashnorm_compile.kernels.convolution import launch

    return launch.convolution_weighted(gradient, input, weights, *geometry)
