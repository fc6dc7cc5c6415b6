"""From tensors to kernels: layouts, tiles and scratch memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from flashnorm_compile.kernels.records import encode_records, triton_dtype

# Numbers that a program adds up where tokens were split.
BLOCK = 2048
# A program takes up the sites of a launch one by one.
SITES_PER_LAUNCH = 8


@dataclass(frozen=True)
class _Way:
    """What the sites of one launch have in common.

    Attributes:
        dtype: of operands and products.
        left: how left is read, see `Layout.along`.
        right: how right is read.
        tile: what a program works on at a time.
    """

    dtype: torch.dtype
    left: str
    right: str
    tile: Tile


# Operands and products.
_Site = tuple[Operand, Operand, Tensor]


def flash_norm(left: Tensor, right: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """`op.flash_norm` for CUDA tensors. Does not synchronise with the host."""
    if 0 in (*left.shape, right.shape[2]):
        # Nothing to multiply, but perhaps left to sum.
        squares = left.new_zeros(left.shape[0], dtype=torch.float32)
        sums = left.sum(2, dtype=torch.float32)
        return squares, sums.square().sum(1) if bias else sums.new_empty(0)
    with torch.cuda.device_of(left):
        return _products(left, right, None, bias)


def materialize_norms(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], out_dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """`op.materialize_norms` for CUDA tensors. Does not synchronise with the host."""
    device, samples = find_device(lefts[0].device), lefts[0].shape[0]
    outs, squares = [], []
    together: dict[_Way, list[_Site]] = {}
    with torch.cuda.device_of(lefts[0]):
        for left, right in zip(lefts, rights, strict=True):
            out = left.new_empty((samples, left.shape[1], right.shape[2]), dtype=out_dtype)
            outs.append(out)
            if 0 in (*left.shape, right.shape[2]):
                out.zero_()
                continue
            site = _read(left.transpose(1, 2), device), _read(right, device), out
            way = _find_way(*site)
            if way is None:
                squares.append(_products(left, right, out, False)[0])
            else:
                together.setdefault(way, []).append(site)
        for way, sites in together.items():
            size = cdiv(len(sites), cdiv(len(sites), SITES_PER_LAUNCH))
            for first in range(0, len(sites), size):
                squares.append(_launch_sites(sites[first : first + size], way, device))
    return outs, _add_up(squares, lefts[0])


def _add_up(squares: Sequence[Tensor], like: Tensor) -> Tensor:
    """Add up squares [B] of sites, if there are any."""
    if len(squares) == 1:
        return squares[0]
    if squares:
        return torch.stack(list(squares)).sum(0)
    return like.new_zeros(like.shape[0], dtype=torch.float32)


def _find_way(left: Operand, right: Operand, out: Tensor) -> _Way | None:
    """Return how a site is computed beside others; None if it is computed alone."""
    (_, tokens, m), n = left.tensor.shape, right.tensor.shape[2]
    dtype, along = left.tensor.dtype, (left.layout.along, right.layout.along)
    aligned = n * out.element_size() % 16 == 0
    if "any" in along or dtype != out.dtype or dtype.itemsize != 2 or not aligned:
        return None
    return _Way(dtype, *along, choose_tile(m, n, tokens, dtype, True))


def _launch_sites(sites: Sequence[_Site], way: _Way, device: Device) -> Tensor:
    """Start `kernel.sites_kernel`, which describes the arguments; return squares [B] of all."""
    tile = way.tile
    samples = sites[0][2].shape[0]
    programs = device.processors * tile.per_processor
    counts = [cdiv(out.shape[1], tile.m) * cdiv(out.shape[2], tile.n) for *_, out in sites]
    width = sum(counts)
    if len(sites) == 1 or samples * width < programs:
        # Alone, or even together so few tiles that their tokens are split.
        found = [
            _products(left.tensor.transpose(1, 2), right.tensor, out, False)[0]
            for left, right, out in sites
        ]
        return _add_up(found, found[0])
    squares = sites[0][2].new_empty((samples, width), dtype=torch.float32)
    records = []
    first = 0
    for k, ((left, right, out), count) in enumerate(zip(sites, counts, strict=True)):
        addresses = left.tensor.data_ptr(), right.tensor.data_ptr(), out.data_ptr()
        sizes = left.tensor.shape[1], *out.shape[1:]
        strides = *left.layout.strides, *right.layout.strides
        records.append((k, *addresses, *sizes, *strides, first))
        first += count
    codes = encode_records(records, len(sites))
    allow_descriptors(device)
    kernel.sites_kernel[(min(samples * width, programs),)](
        codes,
        squares,
        len(sites),
        samples,
        width,
        LENGTH=len(codes),
        DTYPE=triton_dtype(way.dtype),
        LEFT=way.left,
        RIGHT=way.right,
        UPCAST=device.interpreted,
        BLOCK_T=tile.tokens,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        num_warps=tile.warps,
        num_stages=count_stages(tile, way.dtype, way.dtype, device.shared),
    )
    return squares.sum(1)


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
