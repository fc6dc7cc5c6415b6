"""The custom ops ``flashnorm::convolution_*``: gradients of a 2-d convolution's weight, by sample.

All take the gradient of a convolution's output, its input and its geometry. Products of 16-bit
operands are exact and summed in float32. Float32 operands are multiplied in float32, or in TF32
where ``torch.backends.cuda.matmul.allow_tf32`` says so at the time of the call. Float64 operands,
and the CPU, are left to the composition in `reference`. A transposed convolution's weight gets its
gradients from the same ops, with gradient and input exchanged.

On a GPU, operands whose channels lie side by side (channels_last) are read as they are; others are
copied, or read element by element where there are few channels. Depthwise convolutions are right,
but leave the matrix units all but empty: there, compositions are faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm_compile.kernels.convolution import reference


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
    _validate("convolution_samples", gradient, input, *geometry)
    _validate_dtype(out_dtype)
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
    _validate("convolution_samples", gradient, input, *geometry)
    _validate_dtype(out_dtype)
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
    _validate("convolution_samples", gradient, input, *geometry)
    _validate_dtype(out_dtype)
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
    _validate("convolution_norm", gradient, input, *geometry)
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
    _validate("convolution_norm", gradient, input, *geometry)
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
    _validate("convolution_norm", gradient, input, *geometry)
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
    _validate("convolution_weighted", gradient, input, *geometry)
    _validate_weights(weights, gradient)
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
    _validate("convolution_weighted", gradient, input, *geometry)
    _validate_weights(weights, gradient)
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
    _validate("convolution_weighted", gradient, input, *geometry)
    _validate_weights(weights, gradient)
    if gradient.dtype == torch.float64:
        return reference.weighted(reference.samples(gradient, input, *geometry), weights)
    from flashnorm_compile.kernels.convolution import launch

    return launch.convolution_weighted(gradient, input, weights, *geometry)


def _validate(
    op: str,
    gradient: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
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


def _validate_dtype(out_dtype: torch.dtype) -> None:
    if not out_dtype.is_floating_point:
        raise ValueError(
            f"convolution_samples: out_dtype is {out_dtype}; expected a real floating dtype"
        )


def _validate_weights(weights: Tensor, gradient: Tensor) -> None:
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
