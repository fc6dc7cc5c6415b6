"""Tiles of Gram matrices, in Triton."""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from flashnorm_compile.kernels.loading import load


@triton.jit
def grams(
    site,
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
    # Triton 3.6 passes no string from a tuple on to a function, unless it is named a constant.
    LEFT: tl.constexpr = LAYOUTS[0]
    RIGHT: tl.constexpr = LAYOUTS[1]
    LEFT2: tl.constexpr = LAYOUTS[2]
    RIGHT2: tl.constexpr = LAYOUTS[3]
    operands, widths = site[0], site[1]
    i, j, sample = where[2], where[3], where[4]
    g = _gram(
        operands[1], operands[3], sample, i * TILE, j * TILE, widths[1], part, parts,
        RIGHT, RIGHT2, SAME, TMA, UPCAST, TILE, BLOCK,
    )  # fmt: skip
    if GIVEN:
        T = sizes[1]
        row = i * TILE + tl.arange(0, TILE)[:, None]
        column = j * TILE + tl.arange(0, TILE)[None, :]
        products_ptr = operands[0] + (sample.to(tl.int64) * T + row) * T + column
        a = tl.load(products_ptr, mask=(row < T) & (column < T), other=0.0)
    else:
        a = _gram(
            operands[0], operands[2], sample, i * TILE, j * TILE, widths[0], part, parts,
            LEFT, LEFT2, SAME, TMA, UPCAST, TILE, BLOCK,
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
    X_ALONG: tl.constexpr,
    Y_ALONG: tl.constexpr,
    SAME: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((TILE, TILE), tl.float32)
    steps = tl.cdiv(width, BLOCK)
    for step in range(steps * part // parts, steps * (part + 1) // parts):
        a = load(x, sample, row, step * BLOCK, X_ALONG, TMA, TILE, BLOCK)
        b = a if SAME else load(y, sample, column, step * BLOCK, Y_ALONG, TMA, TILE, BLOCK)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    return total
