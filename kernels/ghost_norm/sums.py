"""Sums over a tile, and over the tiles of a sample, in Triton."""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .reference import FLOOR

_FLOOR: tl.constexpr = tl.constexpr(FLOOR)
# Tiles whose sums are added up at once.
_CHUNK: tl.constexpr = tl.constexpr(64)


@triton.jit
def tile_sums(
    a,
    g,
    norms,
    written,
    sizes,
    factors,
    where,
    SYMMETRIC: tl.constexpr,
    ONE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the sums over a tile; for the gradient's last tile, over all of them."""
    _, T, S, gradients, out_columns, blocks, tiles = sizes
    out_ptr, partials_ptr, _, counters_ptr = written
    tile, gradient, i, j, _, out_column = where
    rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    row, column = gradient.to(tl.int64) * T + rows, gradient.to(tl.int64) * S + columns
    spread = 0.0
    times = 1.0
    if SYMMETRIC:
        if i == j:
            same = rows[:, None] == columns[None, :]
            left = tl.sqrt(tl.sum(tl.where(same, a, 0.0), 1) * factors[0] + _FLOOR)
            right = tl.sqrt(tl.sum(tl.where(same, g, 0.0), 1) * factors[1] + _FLOOR)
            tl.store(norms[0] + row, left, mask=rows < T)
            tl.store(norms[1] + row, right, mask=rows < T)
            spread = tl.sum(tl.where(rows < T, left * right, 0.0))
            if ONE:
                tl.debug_barrier()
            else:
                signal(counters_ptr + gradient)
        else:
            _wait(counters_ptr + gradient, blocks)
            times = 2.0
    left = tl.load(norms[0] + row, mask=rows < T, other=0.0, cache_modifier=".cg")
    right = tl.load(norms[1] + row, mask=rows < T, other=0.0, cache_modifier=".cg")
    left2 = tl.load(norms[2] + column, mask=columns < S, other=0.0, cache_modifier=".cg")
    right2 = tl.load(norms[3] + column, mask=columns < S, other=0.0, cache_modifier=".cg")
    # Over columns first: fewer numbers are added up one after the other.
    product = tl.sum(tl.sum(a * g, 1)) * times
    by_left = tl.sum(tl.sum(tl.abs(g) * left2[None, :], 1) * left) * times
    by_right = tl.sum(tl.sum(tl.abs(a) * right2[None, :], 1) * right) * times
    out_ptr += out_column
    if ONE:
        _store(out_ptr, out_columns, product, spread, by_left, by_right, SYMMETRIC)
    else:
        first_ptr = partials_ptr + gradient.to(tl.int64) * tiles * 4
        partial_ptr = partials_ptr + tile.to(tl.int64) * 4
        _store(partial_ptr, 1, product, spread, by_left, by_right, SYMMETRIC)
        if signal(counters_ptr + gradients + gradient) == tiles - 1:
            _add_up(first_ptr, tiles, out_ptr, out_columns, SYMMETRIC)


@triton.jit
def _store(ptr, step, product, spread, by_left, by_right, SYMMETRIC: tl.constexpr):
    tl.store(ptr, product)
    if SYMMETRIC:
        tl.store(ptr + step, spread)
        ptr += step
    tl.store(ptr + step, by_left)
    tl.store(ptr + 2 * step, by_right)


@triton.jit
def _add_up(partials_ptr, tiles, out_ptr, step, SYMMETRIC: tl.constexpr):
    """Add up a gradient's tiles in order, in float64: there may be very many."""
    place = tl.arange(0, 4)
    there = place < (4 if SYMMETRIC else 3)
    total = tl.zeros((4,), tl.float64)
    for first in range(0, tiles, _CHUNK):
        tile = first + tl.arange(0, _CHUNK)[:, None]
        inside = (tile < tiles) & there[None, :]
        place_ptr = partials_ptr + tile * 4 + place[None, :]
        partials = tl.load(place_ptr, mask=inside, other=0.0, cache_modifier=".cg")
        total += tl.sum(partials.to(tl.float64), 0)
    tl.store(out_ptr + place * step, total.to(tl.float32), mask=there)


@triton.jit
def signal(counter_ptr):
    """Count one more, after all that the program has written; return the count before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _wait(counter_ptr, count):
    """Wait for a count; what was written before it can be read then, past the L1 cache."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < count:
        pass
