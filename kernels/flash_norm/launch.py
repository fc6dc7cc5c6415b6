"""From tensors to kernels: layouts, tiles and scratch memory."""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm_compile.kernels.device import Device, find_device, float32_precision
from flashnorm_compile.kernels.division import cdiv, round_up
from flashnorm_compile.kernels.flash_norm import kernel
from flashnorm_compile.kernels.flash_norm.tiling import (
    Tile,
    choose_tile,
    count_splits,
    count_stages,
)
from flashnorm_compile.kernels.loading import allow_descriptors
from flashnorm_compile.kernels.operands import Layout, Operand, describe_operand

# Numbers that a program adds up where tokens were split.
BLOCK = 2048


def flash_norm(left: Tensor, right: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """`op.flash_norm` for CUDA tensors. Does not synchronise with the host."""
    if 0 in (*left.shape, right.shape[2]):
        # Nothing to multiply, but perhaps left to sum.
        squares = left.new_zeros(left.shape[0], dtype=torch.float32)
        sums = left.sum(2, dtype=torch.float32)
        return squares, sums.square().sum(1) if bias else sums.new_empty(0)
    with torch.cuda.device_of(left):
        return _products(left, right, None, bias)


def materialize_norm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`op.materialize_norm` for CUDA tensors. Does not synchronise with the host."""
    (samples, m, tokens), n = left.shape, right.shape[2]
    out = left.new_empty((samples, m, n), dtype=out_dtype)
    if 0 in (samples, m, tokens, n):
        return out.zero_(), left.new_zeros(samples, dtype=torch.float32)
    with torch.cuda.device_of(left):
        return out, _products(left, right, out, False)[0]


def _products(
    left: Tensor, right: Tensor, out: Tensor | None, bias: bool
) -> tuple[Tensor, Tensor]:
    """Return the squares of the products and of the bias; write the products to ``out``."""
    device = find_device(left.device)
    operands = _read(left.transpose(1, 2), device), _read(right, device)
    (samples, m, tokens), n = left.shape, right.shape[2]
    described = all(operand.layout.along != "any" for operand in operands)
    tile = choose_tile(m, n, tokens, left.dtype, described)
    rows, columns = cdiv(m, tile.m), cdiv(n, tile.n)
    programs = device.processors * tile.per_processor
    splits = count_splits(samples * rows * columns, tokens, tile, programs)

    def scratch(*shape: int) -> Tensor:
        return left.new_empty(shape, dtype=torch.float32)

    if splits == 1:
        squares = scratch(samples, rows * columns)
        sums = scratch(samples, rows) if bias else squares
        _launch(*operands, out, squares, sums, 1, programs, tile, device, bias)
    else:
        # Rows of 16 bytes, for descriptors.
        parts = scratch(samples, splits, m, round_up(n, 4))
        sums = scratch(samples, splits, m) if bias else parts
        _launch(*operands, parts, parts, sums, splits, programs, tile, device, bias)
        squares = _add_parts(parts, out)
        sums = _add_parts(sums, None) if bias else sums
    return squares.sum(1), sums.sum(1) if bias else scratch(0)


def _launch(
    left: Operand,
    right: Operand,
    out: Tensor | None,
    squares: Tensor,
    sums: Tensor,
    splits: int,
    programs: int,
    tile: Tile,
    device: Device,
    bias: bool,
) -> None:
    """Start `kernel.products_kernel`, which describes the arguments."""
    (samples, tokens, m), n = left.tensor.shape, right.tensor.shape[2]
    width, writing, out_dtype = n, "none", None
    if out is not None:
        width, out_dtype = out.shape[-1], out.dtype
        aligned = width * out_dtype.itemsize % 16 == 0
        writing = "descriptor" if aligned and device.hopper else "pointers"
    allow_descriptors(device)
    tiles = samples * splits * cdiv(m, tile.m) * cdiv(n, tile.n)
    kernel.products_kernel[(min(tiles, programs),)](
        left.tensor,
        right.tensor,
        squares if out is None else out,
        squares,
        sums,
        samples,
        tokens,
        m,
        n,
        width,
        *left.layout.strides,
        *right.layout.strides,
        splits,
        cdiv(cdiv(tokens, tile.tokens), splits),
        LEFT=left.layout.along,
        RIGHT=right.layout.along,
        OUT=writing,
        SPLIT=splits > 1,
        BIAS=bias,
        PRECISION=float32_precision(),
        UPCAST=device.interpreted,
        BLOCK_T=tile.tokens,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        num_warps=tile.warps,
        num_stages=count_stages(tile, left.tensor.dtype, out_dtype, device.shared),
    )


def _add_parts(parts: Tensor, out: Tensor | None) -> Tensor:
    """Add up [B, splits, ...] over splits; return sums of squares [B, chunks], fill ``out``."""
    samples, splits, size = parts.shape[0], parts.shape[1], parts[0, 0].numel()
    chunks = cdiv(size, BLOCK)
    squares = parts.new_empty(samples, chunks)
    kernel.add_parts_kernel[(samples * chunks,)](
        parts,
        squares if out is None else out,
        squares,
        splits,
        chunks,
        size,
        parts.shape[-1],
        parts.shape[-1] if out is None else out.shape[-1],
        STORE=out is not None,
        BLOCK=BLOCK,
    )
    return squares


def _read(x: Tensor, device: Device) -> Operand:
    """Return how [B, T, width] is read: by tensor descriptors only where large tiles are."""
    if not device.hopper:
        return Operand(x, Layout("any", x.stride()))
    return describe_operand(x, descriptors=True)
