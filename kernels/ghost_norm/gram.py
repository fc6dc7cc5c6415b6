"""Tiles of Gram matrices, in Triton: rows are read by tensor descriptors or by pointers."""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def describe(
    ptr,
    samples,
    rows,
    width,
    sample_stride,
    outer_stride,
    CONTIGUOUS: tl.constexpr,
    TMA: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return what `_load` reads from: it knows where each sample ends."""
    if not TMA:
        return (ptr, sample_stride, outer_stride, rows, width)
    elif CONTIGUOUS:
        return tl.make_tensor_descriptor(
            ptr, [samples, rows, width], [sample_stride, outer_stride, 1], [1, TILE, BLOCK]
        )
    else:
        return tl.make_tensor_descriptor(
            ptr, [samples, width, rows], [sample_stride, outer_stride, 1], [1, BLOCK, TILE]
        )


@triton.jit
def grams(
    operands,
    sizes,
    where,
    part,
    parts,
    LAYOUTS: tl.constexpr,
    GIVEN: tl.constexpr,
    SAME: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the tile of both matrices, or a part of their sums over places."""
    _, sample, i, j = where
    g = _gram(
        operands[1], operands[3], sample, i * TILE, j * TILE, sizes[4], part, parts,
        LAYOUTS[1], LAYOUTS[3], SAME, TMA, UPCAST, TILE, BLOCK,
    )  # fmt: skip
    if GIVEN:
        T = sizes[1]
        row = i * TILE + tl.arange(0, TILE)[:, None]
        column = j * TILE + tl.arange(0, TILE)[None, :]
        products_ptr = operands[0] + (sample.to(tl.int64) * T + row) * T + column
        a = tl.load(products_ptr, mask=(row < T) & (column < T), other=0.0)
    else:
        a = _gram(
            operands[0], operands[2], sample, i * TILE, j * TILE, sizes[3], part, parts,
            LAYOUTS[0], LAYOUTS[2], SAME, TMA, UPCAST, TILE, BLOCK,
        )  # fmt: skip
    return a, g


@triton.jit
def _gram(
    x,
    y,
    sample,
    row,
    column,
    width,
    part,
    parts,
    X_CONTIGUOUS: tl.constexpr,
    Y_CONTIGUOUS: tl.constexpr,
    SAME: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((TILE, TILE), tl.float32)
    steps = tl.cdiv(width, BLOCK)
    for step in range(steps * part // parts, steps * (part + 1) // parts):
        a = _load(x, sample, row, step * BLOCK, X_CONTIGUOUS, TMA, TILE, BLOCK)
        b = a if SAME else _load(y, sample, column, step * BLOCK, Y_CONTIGUOUS, TMA, TILE, BLOCK)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    return total


@triton.jit
def _load(
    x,
    sample,
    row,
    place,
    CONTIGUOUS: tl.constexpr,
    TMA: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return [TILE, BLOCK] from a row and a place on; 0 beyond the sample."""
    if TMA:
        if CONTIGUOUS:
            return x.load([sample, row, place]).reshape(TILE, BLOCK)
        else:
            return x.load([sample, place, row]).reshape(BLOCK, TILE).T
    else:
        ptr, sample_stride, outer_stride, rows, width = x
        # All that is a multiple of 16 bytes is said to be: so much is read at once.
        outer = outer_stride // 8 * 8
        ptr += sample * (sample_stride // 8 * 8)
        r, p = row + tl.arange(0, TILE)[:, None], place + tl.arange(0, BLOCK)[None, :]
        if CONTIGUOUS:
            inside = (r < rows) & (p < (width + 7) // 8 * 8)
            return tl.load(ptr + r * outer + p, mask=inside, other=0.0)
        else:
            inside = (r < (rows + 7) // 8 * 8) & (p < width)
            return tl.load(ptr + p * outer + r, mask=inside, other=0.0)
