"""Pooling, resizing and sampling: windows over the last dims."""

from __future__ import annotations

import re
from typing import Any

from flashnorm_compile.passes.batch_axis.call import Call, several, tensor_arguments
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Value

WINDOWS = "takes windows over the batch axis"

_POOLING = (
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
)
_RESIZING = (
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
_GRADIENTS = (
    *(f"aten.{name}_backward" for name in (*_POOLING, *_RESIZING)),
    *(f"aten.reflection_pad{n}d_backward" for n in (1, 2, 3)),
    *(f"aten.replication_pad{n}d_backward" for n in (1, 2, 3)),
)


@rule(
    *(f"aten.{name}" for name in (*_POOLING, *_RESIZING)),
    *_GRADIENTS,
    "aten.max_unpool2d",
    "aten.max_unpool3d",
    batched=None,
)
def over_last_dims(call: Call) -> Value:
    """Work on the last 1, 2 or 3 dims, as the name says; all tensors have the same dims."""
    match = re.search(r"(\d)d", str(call.node.target))
    assert match is not None
    return _over(call, int(match.group(1)))


@rule("prims._low_memory_max_pool_with_offsets", "prims._low_memory_max_pool_offsets_to_indices")
def low_memory_max_pool(call: Call) -> Value:
    """Work on as many last dims as the kernel has."""
    return _over(call, len(call["kernel_size"]))


def _over(call: Call, count: int) -> Value:
    tensors = tensor_arguments(call)
    axis = call.join(call.value(node) for node in tensors)
    if len({node.meta["val"].dim() for node in tensors}) != 1:
        return call.mixed("no batch-axis rule for tensors of different dims here")
    if isinstance(axis, Batched) and axis.dim >= call.ndim - count:
        return call.mixed(WINDOWS)
    return several(call, axis)


@rule("aten.grid_sampler_2d", "aten.grid_sampler_3d", "aten.cudnn_grid_sampler", batched=None)
def grid_sampler(call: Call) -> Value:
    """Sample each row of the input at that row's own points."""
    return _rows(call)


@rule("aten.grid_sampler_2d_backward", "aten.grid_sampler_3d_backward", batched=None)
def grid_sampler_backward(call: Call) -> Value:
    """Gradients of input and grid, row by row."""
    axis = _rows(call)
    return tuple(axis if on else Constant() for on in call["output_mask"])


def _rows(call: Call) -> Any:
    axis = call.join(call.value(node) for node in tensor_arguments(call))
    return call.mixed(WINDOWS) if isinstance(axis, Batched) and axis.dim != 0 else axis


@rule("aten.im2col")
def im2col(call: Call) -> Value:
    """[rows, channels, h, w] to [rows, channels x kernel, windows]."""
    return call.mixed(WINDOWS) if call.ndim != 4 or call.x.dim != 0 else call.x


@rule("aten.col2im")
def col2im(call: Call) -> Value:
    """[rows, channels x kernel, windows] to [rows, channels, h, w]."""
    return call.mixed(WINDOWS) if call.ndim != 3 or call.x.dim != 0 else call.x


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(call: Call) -> Value:
    """Rearrange the last three dims."""
    return call.mixed(WINDOWS) if call.x.dim >= call.ndim - 3 else call.x


@rule("aten.native_channel_shuffle", "aten.channel_shuffle")
def channel_shuffle(call: Call) -> Value:
    """Rearrange dim 1."""
    return call.mixed("rearranges the batch axis") if call.x.dim == 1 else call.x
