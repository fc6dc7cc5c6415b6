"""What both kernels do with a tile: products [BLOCK_O, BLOCK_C] for some elements of the weight."""

# Triton gives kernel arguments their types, and tuples grow while loops are unrolled.
# mypy: allow-untyped-defs, disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

# A tile is stored together with its square, or only squared, or weighted and added up.
STORE, SQUARE, WEIGHT = tl.constexpr("store"), tl.constexpr("square"), tl.constexpr("weight")
# What varies with the batch is compiled for no particular value.
UNSPECIALIZED = ["weights_ptr", "squares_ptr", "samples", "parts", "units_each"]


@triton.jit
def zeros(TAPS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return TAPS blocks of zeros."""
    tiles = ()
    for _ in tl.static_range(TAPS):
        tiles += (tl.zeros((BLOCK_O, BLOCK_C), tl.float32),)
    return tiles


@triton.jit
def add_weighted(sums, products, weight, TAPS: tl.constexpr):
    """Return sums + weight·products; a sample of weight 0 may hold anything."""
    results = ()
    for tap in tl.static_range(TAPS):
        results += (sums[tap] + tl.where(weight != 0.0, products[tap] * weight, 0.0),)
    return results


@triton.jit
def square(products, DTYPE: tl.constexpr, height, width, TAPS: tl.constexpr):
    """Return the sum of squares of what DTYPE holds of the first rows and columns."""
    squares = tl.zeros(products[0].shape, tl.float32)
    for tap in tl.static_range(TAPS):
        stored = products[tap].to(DTYPE).to(tl.float32)
        squares += stored * stored
    # The rest belongs to other groups.
    inside_o = tl.arange(0, products[0].shape[0]) < height
    inside_c = tl.arange(0, products[0].shape[1]) < width
    return tl.sum(tl.where(inside_o[:, None] & inside_c[None, :], squares, 0.0))


@triton.jit
def write(
    out_ptr,
    tiles,
    place,
    group,
    first_o,
    first_c,
    first_tap,
    outer_each,
    inner_each,
    GROUPS: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Write to the ``place``-th [GROUPS, outer_each, KERNEL, inner_each], row-major."""
    o = first_o + tl.arange(0, tiles[0].shape[0])
    c = first_c + tl.arange(0, tiles[0].shape[1])
    inside = (o < outer_each)[:, None] & (c < inner_each)[None, :]
    row = (place.to(tl.int64) * GROUPS + group) * outer_each + o
    for tap in tl.static_range(TAPS):
        offsets = (row * KERNEL + first_tap + tap)[:, None] * inner_each + c[None, :]
        values = tiles[tap].to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, values, mask=inside)
