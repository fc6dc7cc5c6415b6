"""Sums over two Gram matrices on CUDA devices, in Triton: the matrices are never written.

A program goes from tile to tile. It makes the same tile of both matrices in registers, one after
the other, multiplies them entry by entry, and writes a few numbers.

Of one matrix of products of all rows with each other (SYMMETRIC), a tile off the diagonal stands
for its mirror image too, and one on the diagonal reads its rows once for both operands. Tiles off
the diagonal need the norms of their rows, which lie on it. To square what a tile reads, beside the
tensor cores, would double the traffic of shared memory, of which they need three quarters. To read
all operands in a kernel before takes as long as the products of 256 tokens. To make the diagonal
in a launch before reads the operands of 256 tokens twice, and to read them once takes as long as
to multiply them. So a sample's tiles are taken in turn, those on the diagonal first, and the others
wait for them once their own products are made, which is when the diagonal's are. A program only
waits for items that were taken before its own: whichever programs run at once, one goes on.
"""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from flashnorm_compile.kernels.loading import describe

from .gram import grams
from .sums import signal, tile_sums


# What varies with the batch size is compiled for no particular integers: in a layout [T, B, d] the
# strides of rows do, too. Norms may come from anywhere.
@triton.jit(
    do_not_specialize=[
        "left_norms_ptr", "right_norms_ptr", "left2_norms_ptr", "right2_norms_ptr",
        "samples", "whole", "splits",
        "left_sample", "right_sample", "left2_sample", "right2_sample",
        "left_outer", "right_outer", "left2_outer", "right2_outer",
    ]
)  # fmt: skip
def sums_kernel(
    left_ptr,
    right_ptr,
    left2_ptr,
    right2_ptr,
    left_norms_ptr,
    right_norms_ptr,
    left2_norms_ptr,
    right2_norms_ptr,
    out_ptr,
    scratch_ptr,
    counters_ptr,
    samples,
    T,
    S,
    m,
    n,
    left_sample: tl.int64,
    left_outer: tl.int64,
    right_sample: tl.int64,
    right_outer: tl.int64,
    left2_sample: tl.int64,
    left2_outer: tl.int64,
    right2_sample: tl.int64,
    right2_outer: tl.int64,
    left_factor,
    right_factor,
    whole,
    splits,
    LAYOUTS: tl.constexpr,
    GIVEN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ONE: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the sums of `op.ghost_norm` (SYMMETRIC) or `op.ghost_product`.

    Args:
        left_ptr: rows [B, T, m], 16-bit; see ``LAYOUTS``. If GIVEN: float32 [B, T, T].
        right_ptr: rows [B, T, n].
        left2_ptr: rows [B, S, m]; for SYMMETRIC, left.
        right2_ptr: rows [B, S, n]; for SYMMETRIC, right.
        left_norms_ptr: float32 [B, T]; for SYMMETRIC, norms are in the scratch memory.
        right_norms_ptr: float32 [B, T].
        left2_norms_ptr: float32 [B, S].
        right2_norms_ptr: float32 [B, S].
        out_ptr: float32 [sums, B].
        scratch_ptr: float32: parts [split tiles, splits, 2, TILE, TILE] of tiles, their sums
            [B, tiles, 4], and norms [2, B, T] for SYMMETRIC.
        counters_ptr: int32 zeros, unless ONE and there are no split tiles: of each sample, tiles of
            the diagonal whose norms are written; of each sample, tiles that are done; items that
            are taken; of each split tile, parts that are written.
        samples: B.
        T: rows of left and right.
        S: rows of left2 and right2.
        m: width of the rows of left and left2.
        n: width of the rows of right and right2.
        left_sample: stride of samples; so are those of the other operands.
        left_outer: stride of rows or, if rows lie side by side, of places in them.
        right_sample: see left_sample.
        right_outer: see left_outer.
        left2_sample: see left_sample.
        left2_outer: see left_outer.
        right2_sample: see left_sample.
        right2_outer: see left_outer.
        left_factor: what squares of left's norms are multiplied with, for SYMMETRIC.
        right_factor: the same for right.
        whole: the first so many tiles of all samples are each made by one program.
        splits: others are made in so many parts, each of a part of their rows.
        LAYOUTS: of the four operands, what lies side by side: "places" of a row, or "tokens", rows.
        GIVEN: whether left's rows are multiplied by each other already.
        SYMMETRIC: whether there is one site or two.
        ONE: whether a sample has one tile.
        TMA: whether to read by tensor descriptors; else by pointers.
        UPCAST: whether to multiply in float32 (the interpreter cannot multiply bfloat16).
        TILE: rows and columns of a tile.
        BLOCK: places of rows that are multiplied at once.
    """
    # Triton 3.6 passes no string from a tuple on to a function, unless it is named a constant.
    LEFT: tl.constexpr = LAYOUTS[0]
    RIGHT: tl.constexpr = LAYOUTS[1]
    LEFT2: tl.constexpr = LAYOUTS[2]
    RIGHT2: tl.constexpr = LAYOUTS[3]
    # Of one of its two dims an operand's stride is 1, and is not read.
    if GIVEN:
        left = left_ptr
    else:
        left = describe(
            left_ptr, (samples, T, m), (left_sample, left_outer, left_outer),
            LEFT, TMA, TILE, BLOCK,
        )  # fmt: skip
    right = describe(
        right_ptr, (samples, T, n), (right_sample, right_outer, right_outer),
        RIGHT, TMA, TILE, BLOCK,
    )  # fmt: skip
    blocks, blocks2 = tl.cdiv(T, TILE), tl.cdiv(S, TILE)
    if SYMMETRIC:
        left2, right2 = left, right
        tiles = blocks * (blocks + 1) // 2
    else:
        left2 = describe(
            left2_ptr, (samples, S, m), (left2_sample, left2_outer, left2_outer),
            LEFT2, TMA, TILE, BLOCK,
        )  # fmt: skip
        right2 = describe(
            right2_ptr, (samples, S, n), (right2_sample, right2_outer, right2_outer),
            RIGHT2, TMA, TILE, BLOCK,
        )  # fmt: skip
        tiles = blocks * blocks2
    operands = (left, right, left2, right2)
    split_tiles = samples * tiles - whole
    partials_ptr = scratch_ptr + split_tiles.to(tl.int64) * splits * (2 * TILE * TILE)
    if SYMMETRIC:
        left_norms_ptr = partials_ptr + samples.to(tl.int64) * tiles * 4
        right_norms_ptr = left_norms_ptr + samples.to(tl.int64) * T
        norms = (left_norms_ptr, right_norms_ptr, left_norms_ptr, right_norms_ptr)
    else:
        norms = (left_norms_ptr, right_norms_ptr, left2_norms_ptr, right2_norms_ptr)
    written = (out_ptr, partials_ptr, scratch_ptr, counters_ptr)
    sizes = (samples, T, S, m, n, blocks, tiles)
    factors = (left_factor, right_factor)

    items = whole + split_tiles * splits
    turns = items
    if SYMMETRIC and not ONE:
        # Programs whose tiles were quick take up to two more than their share.
        turns += 2 * tl.num_programs(0)
    # What moves out of this loop would stay in registers, of which there are none left.
    for turn in tl.range(tl.program_id(0), turns, tl.num_programs(0), disable_licm=True):
        item = turn
        if SYMMETRIC and not ONE:
            # Items are taken in order: somebody is at work on those that this one waits for.
            item = tl.atomic_add(counters_ptr + 2 * samples, 1, sem="relaxed")
        if item < items:
            _item(
                operands, norms, written, sizes, factors, item, whole, splits, blocks2,
                LAYOUTS, GIVEN, SYMMETRIC, ONE, TMA, UPCAST, TILE, BLOCK,
            )  # fmt: skip


@triton.jit
def _item(
    operands,
    norms,
    written,
    sizes,
    factors,
    item,
    whole,
    splits,
    blocks2,
    LAYOUTS: tl.constexpr,
    GIVEN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ONE: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make a tile or a part of one, and its sums."""
    blocks, tiles = sizes[5], sizes[6]
    tile = tl.minimum(item, whole) + tl.maximum(item - whole, 0) // splits
    place = tile % tiles
    if SYMMETRIC:
        # All pairs: (0, 0), (1, 1), ..., (0, 1), (1, 2), ..., (last, 0), (0, 2), ...
        i = place % blocks
        j = (i + place // blocks) % blocks
    else:
        i, j = place // blocks2, place % blocks2
    where = (tile, tile // tiles, i, j)
    # Branches end with numbers: if they left their sums to common code, these would be moved,
    # and each product would wait for the one before it.
    if not GIVEN and item >= whole:
        _part(
            operands, norms, written, sizes, factors, where,
            tile - whole, (item - whole) % splits, splits,
            LAYOUTS, SYMMETRIC, ONE, TMA, UPCAST, TILE, BLOCK,
        )  # fmt: skip
    elif SYMMETRIC and (ONE or i == j):
        a, g = grams(operands, sizes, where, 0, 1, LAYOUTS, GIVEN, True, TMA, UPCAST, TILE, BLOCK)
        tile_sums(a, g, norms, written, sizes, factors, where, SYMMETRIC, ONE, TILE)
    else:
        a, g = grams(operands, sizes, where, 0, 1, LAYOUTS, GIVEN, False, TMA, UPCAST, TILE, BLOCK)
        tile_sums(a, g, norms, written, sizes, factors, where, SYMMETRIC, ONE, TILE)


@triton.jit
def _part(
    operands,
    norms,
    written,
    sizes,
    factors,
    where,
    split_tile,
    part,
    parts,
    LAYOUTS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ONE: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make a part of a tile; whoever is last adds up all parts, in order."""
    a, g = grams(
        operands, sizes, where, part, parts,
        LAYOUTS, False, SYMMETRIC and ONE, TMA, UPCAST, TILE, BLOCK,
    )  # fmt: skip
    SIZE: tl.constexpr = TILE * TILE
    entry = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    parts_ptr = written[2] + split_tile.to(tl.int64) * parts * (2 * SIZE) + entry
    tl.store(parts_ptr + part * (2 * SIZE), a)
    tl.store(parts_ptr + part * (2 * SIZE) + SIZE, g)
    if signal(written[3] + 2 * sizes[0] + 1 + split_tile) == parts - 1:
        a, g = tl.zeros((TILE, TILE), tl.float32), tl.zeros((TILE, TILE), tl.float32)
        for other in range(parts):
            a += tl.load(parts_ptr + other * (2 * SIZE), cache_modifier=".cg")
            g += tl.load(parts_ptr + other * (2 * SIZE) + SIZE, cache_modifier=".cg")
        tile_sums(a, g, norms, written, sizes, factors, where, SYMMETRIC, ONE, TILE)
