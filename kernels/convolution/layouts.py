"""How operands are laid out for `boxes.boxes_kernel`: in pieces of 16 bytes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from flashnorm_compile.kernels.convolution.tiling import choose_box
from flashnorm_compile.kernels.convolution.transpose import (
    BLOCK,
    REORDER_BLOCK,
    reorder_kernel,
    transpose_kernel,
)
from flashnorm_compile.kernels.division import cdiv, round_up

# Fewer channels in a group would leave most of a box empty.
LEAST_CHANNELS = 8

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Of a convolution, for rows and columns."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(
        cls,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Geometry:
        """Take the arguments of the ops."""
        a, b, c, d = ((int(h), int(w)) for h, w in (kernel_size, stride, padding, dilation))
        return cls(a, b, c, d, groups)

    @functools.cache  # noqa: B019 (there are few of them)
    def constants(self) -> dict[str, int]:
        """Return what both kernels are compiled for."""
        pairs = {
            "KERNEL": self.kernel,
            "STRIDE": self.stride,
            "PADDING": self.padding,
            "DILATION": self.dilation,
        }
        sizes = {f"{name}_{d}": pair[i] for name, pair in pairs.items() for i, d in enumerate("HW")}
        return sizes | {"GROUPS": self.groups}


@dataclasses.dataclass(frozen=True)
class Operands:
    """A convolution's weight gradient, perhaps as that of another convolution.

    Attributes:
        gradient: [B, O, Ho, Wo].
        input: [B, C, H, W].
        geometry: of the convolution.
        boxes: whether both are as `boxes.boxes_kernel` reads them: channels lie side by side, or
            positions, where a box holds a range of them.
        window: for a weight [O, rows, 1, elements of a row · padded channels]: both numbers, and
            how many of the channels there are.
    """

    gradient: Tensor
    input: Tensor
    geometry: Geometry
    boxes: bool
    window: tuple[int, int, int] | None = None

    def weight_shape(self) -> tuple[int, int, int, int]:
        """Return the shape that kernels write a weight in: channels of the input come last."""
        height, width = self.geometry.kernel
        return self.gradient.shape[1], height, width, self.input.shape[1] // self.geometry.groups

    def restore(self, weights: Tensor) -> Tensor:
        """Turn [B, *weight_shape] into the weights that were asked for, row-major."""
        if self.window is not None:
            width, padded, channels = self.window
            weights = weights.squeeze(-2).unflatten(-1, (width, padded))[..., :channels]
        samples, outer, height, width, inner = weights.shape
        if height * width == 1 or not weights.is_contiguous():
            return weights.movedim(-1, -3).contiguous()
        out = weights.new_empty(samples, outer, inner, height, width)
        size = out[0].numel()
        reorder_kernel[(samples * cdiv(size, REORDER_BLOCK),)](
            weights, out, size, KERNEL=height * width, INNER=inner, BLOCK=REORDER_BLOCK
        )
        return out


def arrange(gradient: Tensor, input: Tensor, geometry: Geometry, box_size: int) -> Operands:
    """Return the operands as they are best read; they are copied if need be.

    Args:
        gradient: [B, O, Ho, Wo].
        input: [B, C, H, W].
        geometry: of the convolution.
        box_size: positions in a box, at most.
    """
    vector = 16 // gradient.element_size()
    outer, inner = gradient.shape[1] // geometry.groups, input.shape[1] // geometry.groups
    if outer % vector == 0 and inner % vector == 0 and min(outer, inner) >= LEAST_CHANNELS:
        flat = _is_flat(gradient, input, geometry)
        if flat:
            gradient, input = _flatten(gradient), _flatten(input)
        gradient, input = _readable_gradient(gradient, box_size), _readable(input, positions=flat)
        return Operands(gradient, input, geometry, boxes=True)
    if outer % vector == 0 and geometry.groups == 1 and geometry.dilation[1] == 1:
        return _windows(_readable_gradient(gradient, box_size), input, geometry, vector)
    return Operands(gradient, input, geometry, boxes=False)


def strides(x: Tensor) -> tuple[int, int, int, int]:
    """Return the strides of samples, channels, rows, columns; of a size of 1, some that serve."""
    samples, channels, height, width = x.shape
    sample, channel, row, column = x.stride()
    if width == 1:
        column = row if height > 1 else channels
    if height == 1:
        row = column * width
    if samples == 1:
        sample = row * height if channel == 1 else channel * channels
    return sample, channel, row, column


def in_ranges(gradient: Tensor, box: Pair) -> bool:
    """Whether the positions in a box of rows and columns follow one another at one distance."""
    return _is_linear(gradient) and (box[0] == 1 or box[1] == gradient.shape[3])


def _is_linear(x: Tensor) -> bool:
    """Whether all positions follow one another at one distance."""
    _, _, row, column = strides(x)
    return row == column * x.shape[3]


def _is_flat(gradient: Tensor, input: Tensor, geometry: Geometry) -> bool:
    """Whether rows mean nothing: the gradient is the plain product of a 1x1 weight."""
    pairs = (geometry.kernel, geometry.stride, geometry.padding)
    same = gradient.shape[3] == input.shape[3]
    return pairs == ((1, 1), (1, 1), (0, 0)) and same and _is_linear(gradient) and _is_linear(input)


def _channels_last(x: Tensor) -> Tensor:
    """Return a copy whose channels lie side by side."""
    if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
        return x.clone(memory_format=torch.channels_last)
    # PyTorch's own copy takes three times as long.
    samples, channels, height, width = x.shape
    out = torch.empty_like(x, memory_format=torch.channels_last)
    tiles = cdiv(channels, BLOCK) * cdiv(height * width, BLOCK)
    transpose_kernel[(samples * tiles,)](
        x, out, channels, height * width, x.stride(0), x.stride(1), BLOCK=BLOCK
    )
    return out


def _flatten(x: Tensor) -> Tensor:
    """Put all positions in one row."""
    sample, channel, _, column = strides(x)
    positions = x.shape[2] * x.shape[3]
    shape = (*x.shape[:2], 1, positions)
    return x.as_strided(shape, (sample, channel, column * positions, column))


def _readable_gradient(gradient: Tensor, box_size: int) -> Tensor:
    box = choose_box(gradient.shape[2], gradient.shape[3], box_size)
    return _readable(gradient, positions=in_ranges(gradient, box))


def _readable(x: Tensor, *, positions: bool) -> Tensor:
    """Return x, or a copy of it: channels side by side, all else at multiples of 16 bytes.

    Or positions side by side, if those will do.
    """
    sample, channel, row, column = strides(x)
    others: tuple[int, ...] = (sample, row, column)
    if channel != 1 and column == 1 and positions and _is_linear(x):
        others = (sample, channel)
    elif channel != 1:
        return _channels_last(x)
    aligned = all(n > 0 and n * x.element_size() % 16 == 0 for n in others)
    return x if aligned and x.data_ptr() % 16 == 0 else _channels_last(x)


def _windows(gradient: Tensor, input: Tensor, geometry: Geometry, vector: int) -> Operands:
    """Take what a row of the weight sees for channels: they lie side by side, and overlap.

    For few channels, such as those of images. The input is copied, with its channels padded to 16
    bytes and its columns by the padding.
    """
    samples, channels, height, width = input.shape
    padded = round_up(channels, vector)
    whole = input.new_zeros(samples, height, width + 2 * geometry.padding[1], padded)
    inside = whole[:, :, geometry.padding[1] : geometry.padding[1] + width, :channels]
    inside.copy_(input.permute(0, 2, 3, 1))
    sample, row, column, _ = whole.stride()
    windows = whole.as_strided(
        (samples, geometry.kernel[1] * padded, height, gradient.shape[3]),
        (sample, 1, row, column * geometry.stride[1]),
    )
    rows = Geometry(
        kernel=(geometry.kernel[0], 1),
        stride=(geometry.stride[0], 1),
        padding=(geometry.padding[0], 0),
        dilation=(geometry.dilation[0], 1),
        groups=1,
    )
    window = (geometry.kernel[1], padded, channels)
    return Operands(gradient, windows, rows, boxes=True, window=window)
