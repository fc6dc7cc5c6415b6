"""From tensors to kernels: tiles, schedules and scratch memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashnorm_compile.kernels.convolution import reference, tiling
from flashnorm_compile.kernels.convolution.boxes import boxes_kernel
from flashnorm_compile.kernels.convolution.elements import elements_kernel
from flashnorm_compile.kernels.convolution.layouts import (
    Geometry,
    Operands,
    arrange,
    in_ranges,
    strides,
)
from flashnorm_compile.kernels.convolution.tiling import Tile
from flashnorm_compile.kernels.device import Device, find_device, float32_precision
from flashnorm_compile.kernels.division import cdiv
from flashnorm_compile.kernels.loading import allow_descriptors


def convolution_samples(
    gradient: Tensor, input: Tensor, *geometry_and_dtype: Any
) -> tuple[Tensor, Tensor]:
    """`op.convolution_samples` for CUDA tensors. Does not synchronise with the host."""
    *geometry, out_dtype = geometry_and_dtype
    return _run("store", gradient, input, None, Geometry.of(*geometry), out_dtype)


def convolution_norm(gradient: Tensor, input: Tensor, *geometry: Any) -> Tensor:
    """`op.convolution_norm` for CUDA tensors. Does not synchronise with the host."""
    return _run("square", gradient, input, None, Geometry.of(*geometry), torch.float32)[1]


def convolution_weighted(
    gradient: Tensor, input: Tensor, weights: Tensor, *geometry: Any
) -> Tensor:
    """`op.convolution_weighted` for CUDA tensors. Does not synchronise with the host."""
    mode, dtype = "weight", torch.float32
    return _run(mode, gradient, input, weights.contiguous(), Geometry.of(*geometry), dtype)[0]


def _run(
    mode: str,
    gradient: Tensor,
    input: Tensor,
    weights: Tensor | None,
    geometry: Geometry,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return what the mode makes, and the squares; what it does not make is of no use."""
    samples = gradient.shape[0]
    if 0 in (*gradient.shape, *input.shape):
        shape = (gradient.shape[1], input.shape[1] // geometry.groups, *geometry.kernel)
        out = gradient.new_zeros((samples, *shape) if mode == "store" else shape, dtype=out_dtype)
        return out, gradient.new_zeros(samples, dtype=torch.float32)
    with torch.cuda.device_of(gradient):
        device = find_device(gradient.device)
        operands = Operands(gradient, input, geometry, boxes=False)
        if device.descriptors:
            box_size = tiling.box_size(gradient.element_size(), _is_exact(gradient))
            operands = arrange(gradient, input, geometry, box_size)
        tile, tiles, boxes = _tiles(mode, operands)
        parts, units_each = tiling.schedule(
            samples, tiles, boxes, device.processors, tile.per_processor, weighted=mode == "weight"
        )
        ranges = cdiv(samples * parts, units_each)

        # Parts of samples are added up before they are squared.
        split = parts > 1 and mode != "weight"
        stored = ranges if mode == "weight" else samples * parts if split or mode == "store" else 0
        out = gradient.new_empty(
            (stored, *operands.weight_shape()), dtype=torch.float32 if split else out_dtype
        )
        squares = gradient.new_empty((tiles, samples * parts), dtype=torch.float32)
        launch = _launch_boxes if operands.boxes else _launch_elements
        launch(
            "store" if split else mode,
            operands,
            squares if weights is None else weights,
            out,
            squares,
            (parts, units_each),
            (tiles, ranges),
            tile,
            device,
        )
        if mode == "weight":
            return operands.restore(out.sum(0, keepdim=True))[0], squares
        if split:
            out = out.unflatten(0, (samples, parts)).sum(1).to(out_dtype)
            return operands.restore(out), reference.squares(out)
        return operands.restore(out) if mode == "store" else out, squares.sum(0)


def _tiles(mode: str, operands: Operands) -> tuple[Tile, int, int]:
    """Return the tile, the number of tiles of a sample, and of boxes of its positions."""
    gradient, geometry = operands.gradient, operands.geometry
    outer, *kernel, inner = operands.weight_shape()
    outer //= geometry.groups
    exact = _is_exact(gradient)
    rows, columns = gradient.shape[2:]
    if not operands.boxes:
        width = inner * math.prod(kernel)
        tile = tiling.choose_elements(outer, width, exact=exact)
        tiles = geometry.groups * cdiv(outer, tile.outer) * cdiv(width, tile.inner)
        return tile, tiles, cdiv(rows * columns, tile.columns)
    tile = tiling.choose_boxes(
        mode, outer, inner, kernel[1], (rows, columns), gradient.element_size(), exact=exact
    )
    blocks = cdiv(outer, tile.outer) * cdiv(inner, tile.inner)
    tiles = geometry.groups * blocks * math.prod(kernel) // tile.taps
    return tile, tiles, cdiv(rows, tile.rows) * cdiv(columns, tile.columns)


def _launch_boxes(
    mode: str,
    operands: Operands,
    weights: Tensor,
    out: Tensor,
    squares: Tensor,
    schedule: tuple[int, int],
    grid: tuple[int, int],
    tile: Tile,
    device: Device,
) -> None:
    gradient, input = operands.gradient, operands.input
    allow_descriptors(device)
    rows, columns = gradient.shape[2:]
    boxes_kernel[grid](
        gradient,
        input,
        weights,
        out,
        squares,
        gradient.shape[0],
        *schedule,
        gradient.shape[1],
        input.shape[1],
        rows,
        columns,
        *input.shape[2:],
        *strides(gradient),
        *strides(input),
        **operands.geometry.constants(),
        MODE=mode,
        TAPS=tile.taps,
        BLOCK_O=tile.outer,
        BLOCK_C=tile.inner,
        BLOCK_H=tile.rows,
        BLOCK_W=tile.columns,
        ONE_BOX=rows <= tile.rows and columns <= tile.columns,
        GRADIENT=_along(gradient) if in_ranges(gradient, (tile.rows, tile.columns)) else "elements",
        INPUT=_along(input),
        PRECISION=float32_precision(),
        UPCAST=device.interpreted,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _launch_elements(
    mode: str,
    operands: Operands,
    weights: Tensor,
    out: Tensor,
    squares: Tensor,
    schedule: tuple[int, int],
    grid: tuple[int, int],
    tile: Tile,
    device: Device,
) -> None:
    gradient, input = operands.gradient, operands.input
    elements_kernel[grid](
        gradient,
        input,
        weights,
        out,
        squares,
        gradient.shape[0],
        *schedule,
        gradient.shape[1],
        input.shape[1],
        gradient.shape[2],
        *input.shape[2:],
        *gradient.stride(),
        *input.stride(),
        COLUMNS=gradient.shape[3],
        **operands.geometry.constants(),
        MODE=mode,
        GRADIENT_ALONG=_along(gradient),
        INPUT_ALONG=_along(input),
        BLOCK_O=tile.outer,
        BLOCK_C=tile.inner,
        BLOCK_P=tile.columns,
        PRECISION=float32_precision(),
        UPCAST=device.interpreted,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _along(x: Tensor) -> str:
    """Return what lies side by side in memory."""
    _, channel, _, column = strides(x)
    return "channels" if channel <= column else "positions"


def _is_exact(x: Tensor) -> bool:
    """Whether products are made in float32, without matrix units."""
    return x.dtype == torch.float32 and float32_precision() == "ieee"
