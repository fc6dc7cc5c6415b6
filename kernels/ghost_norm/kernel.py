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
from flashnorm_compile.kernels.records import decode, find_record, pointer

from .gram import grams
from .sums import signal, tile_sums


# No integer is compiled for: sizes vary with the batch size, and with what is launched together.
# Norms may come from anywhere.
@triton.jit(
    do_not_specialize=[
        "left_norms_ptr", "right_norms_ptr", "left2_norms_ptr", "right2_norms_ptr",
        "count", "samples", "T", "S", "columns", "whole", "splits",
    ]
)  # fmt: skip
def sums_kernel(
    sites,
    left_norms_ptr,
    right_norms_ptr,
    left2_norms_ptr,
    right2_norms_ptr,
    out_ptr,
    scratch_ptr,
    counters_ptr,
    count,
    samples,
    T,
    S,
    columns,
    whole,
    splits,
    LENGTH: tl.constexpr,
    DTYPE: tl.constexpr,
    LAYOUTS: tl.constexpr,
    GIVEN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ONE: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the sums of `op.ghost_norms` (SYMMETRIC) or `op.ghost_product`.

    A sample of a site has a gradient of its own: gradient = site·B + sample.

    Args:
        sites: LENGTH records of codes, see `records`: the position of the site in this launch, and
            among all sites, where its sums are written; the addresses of left, right, left2 and
            right2; m and n; strides of samples
            and of rows (of places, if rows lie side by side) of the four; and the bits of two
            float32 that squares of left's and of right's norms are multiplied with. For SYMMETRIC,
            left2 and right2 are left and right.

            left: rows [B, T, m]; see ``LAYOUTS``. If GIVEN: float32 [B, T, T].
            right: rows [B, T, n].
            left2: rows [B, S, m].
            right2: rows [B, S, n].
        left_norms_ptr: float32 [B, T]; for SYMMETRIC, norms are in the scratch memory.
        right_norms_ptr: float32 [B, T].
        left2_norms_ptr: float32 [B, S].
        right2_norms_ptr: float32 [B, S].
        out_ptr: float32 [sums, columns].
        scratch_ptr: float32: parts [split tiles, splits, 2, TILE, TILE] of tiles, their sums
            [gradients, tiles, 4], and norms [2, gradients, T] for SYMMETRIC.
        counters_ptr: int32 zeros, unless ONE and there are no split tiles: of each gradient,
            tiles of the diagonal whose norms are written; of each gradient, tiles that are done;
            items that are taken; of each split tile, parts that are written.
        count: sites.
        samples: B.
        T: rows of left and right.
        S: rows of left2 and right2.
        columns: B times the sites of all launches.
        whole: the first so many tiles of all gradients are each made by one program.
        splits: others are made in so many parts, each of a part of the operands' rows.
        LENGTH: of ``sites``.
        DTYPE: of the operands.
        LAYOUTS: of the four operands, what lies side by side: "places" of a row, or "tokens", rows.
        GIVEN: whether left's rows are multiplied by each other already.
        SYMMETRIC: whether there is one site or two.
        ONE: whether a gradient has one tile.
        TMA: whether to read by tensor descriptors; else by pointers.
        UPCAST: whether to multiply in float32 (the interpreter cannot multiply bfloat16).
        TILE: rows and columns of a tile.
        BLOCK: places of rows that are multiplied at once.
    """
    blocks, blocks2 = tl.cdiv(T, TILE), tl.cdiv(S, TILE)
    tiles = blocks * blocks2
    if SYMMETRIC:
        tiles = blocks * (blocks + 1) // 2
    gradients = count * samples
    split_tiles = gradients * tiles - whole
    partials_ptr = scratch_ptr + split_tiles.to(tl.int64) * splits * (2 * TILE * TILE)
    if SYMMETRIC:
        left_norms_ptr = partials_ptr + gradients.to(tl.int64) * tiles * 4
        right_norms_ptr = left_norms_ptr + gradients.to(tl.int64) * T
        norms = (left_norms_ptr, right_norms_ptr, left_norms_ptr, right_norms_ptr)
    else:
        norms = (left_norms_ptr, right_norms_ptr, left2_norms_ptr, right2_norms_ptr)
    written = (out_ptr, partials_ptr, scratch_ptr, counters_ptr)
    sizes = (samples, T, S, gradients, columns, blocks, tiles)
    if LENGTH == 1:
        site = _describe(
            sites[0], sizes, DTYPE, LAYOUTS, GIVEN, SYMMETRIC, TMA, TILE, BLOCK
        )  # fmt: skip

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
            item = tl.atomic_add(counters_ptr + 2 * gradients, 1, sem="relaxed")
        if item < items:
            tile = tl.minimum(item, whole) + tl.maximum(item - whole, 0) // splits
            if LENGTH > 1:
                record = find_record(sites, tile // (samples * tiles), 0, LENGTH)
                site = _describe(
                    record, sizes, DTYPE, LAYOUTS, GIVEN, SYMMETRIC, TMA, TILE, BLOCK
                )  # fmt: skip
            _item(
                site, norms, written, sizes, tile, item, whole, splits, blocks2,
                LAYOUTS, GIVEN, SYMMETRIC, ONE, TMA, UPCAST, TILE, BLOCK,
            )  # fmt: skip


@triton.jit
def _describe(
    record,
    sizes,
    DTYPE: tl.constexpr,
    LAYOUTS: tl.constexpr,
    GIVEN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TMA: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return a site's operands, their widths, the two factors, and its first column of sums."""
    # Triton 3.6 passes no string from a tuple on to a function, unless it is named a constant.
    LEFT: tl.constexpr = LAYOUTS[0]
    RIGHT: tl.constexpr = LAYOUTS[1]
    LEFT2: tl.constexpr = LAYOUTS[2]
    RIGHT2: tl.constexpr = LAYOUTS[3]
    samples, T, S = sizes[0], sizes[1], sizes[2]
    m, n = decode(record[6]).to(tl.int32), decode(record[7]).to(tl.int32)
    # Of one of its two dims an operand's stride is 1, and is not read.
    if GIVEN:
        left = decode(record[2]).to(tl.pointer_type(tl.float32))
    else:
        left = _operand(
            record[2], record[8], record[9], samples, T, m, DTYPE, LEFT, TMA, TILE, BLOCK
        )  # fmt: skip
    right = _operand(
        record[3], record[10], record[11], samples, T, n, DTYPE, RIGHT, TMA, TILE, BLOCK
    )  # fmt: skip
    if SYMMETRIC:
        left2, right2 = left, right
    else:
        left2 = _operand(
            record[4], record[12], record[13], samples, S, m, DTYPE, LEFT2, TMA, TILE, BLOCK
        )  # fmt: skip
        right2 = _operand(
            record[5], record[14], record[15], samples, S, n, DTYPE, RIGHT2, TMA, TILE, BLOCK
        )  # fmt: skip
    factors = _float32(record[16]), _float32(record[17])
    column = decode(record[1]).to(tl.int32) * samples
    return (left, right, left2, right2), (m, n), factors, column


@triton.jit
def _operand(
    address,
    sample_stride,
    outer_stride,
    samples,
    tokens,
    width,
    DTYPE: tl.constexpr,
    ALONG: tl.constexpr,
    TMA: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    outer = decode(outer_stride)
    strides = (decode(sample_stride), outer, outer)
    return describe(
        pointer(address, DTYPE, ALONG), (samples, tokens, width), strides, ALONG, TMA, TILE, BLOCK
    )  # fmt: skip


@triton.jit
def _float32(code):
    return decode(code).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _item(
    site,
    norms,
    written,
    sizes,
    tile,
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
    place, gradient = tile % tiles, tile // tiles
    if SYMMETRIC:
        # All pairs: (0, 0), (1, 1), ..., (0, 1), (1, 2), ..., (last, 0), (0, 2), ...
        i = place % blocks
        j = (i + place // blocks) % blocks
    else:
        i, j = place // blocks2, place % blocks2
    sample = gradient % sizes[0]
    where = (tile, gradient, i, j, sample, site[3] + sample)
    # Branches end with numbers: if they left their sums to common code, these would be moved,
    # and each product would wait for the one before it.
    if not GIVEN and item >= whole:
        _part(
            site, norms, written, sizes, where,
            tile - whole, (item - whole) % splits, splits,
            LAYOUTS, SYMMETRIC, ONE, TMA, UPCAST, TILE, BLOCK,
        )  # fmt: skip
    elif SYMMETRIC and (ONE or i == j):
        a, g = grams(site, sizes, where, 0, 1, LAYOUTS, GIVEN, True, TMA, UPCAST, TILE, BLOCK)
        tile_sums(a, g, norms, written, sizes, site[2], where, SYMMETRIC, ONE, TILE)
    else:
        a, g = grams(site, sizes, where, 0, 1, LAYOUTS, GIVEN, False, TMA, UPCAST, TILE, BLOCK)
        tile_sums(a, g, norms, written, sizes, site[2], where, SYMMETRIC, ONE, TILE)


@triton.jit
def _part(
    site,
    norms,
    written,
    sizes,
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
        site, sizes, where, part, parts,
        LAYOUTS, False, SYMMETRIC and ONE, TMA, UPCAST, TILE, BLOCK,
    )  # fmt: skip
    SIZE: tl.constexpr = TILE * TILE
    entry = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    parts_ptr = written[2] + split_tile.to(tl.int64) * parts * (2 * SIZE) + entry
    tl.store(parts_ptr + part * (2 * SIZE), a)
    tl.store(parts_ptr + part * (2 * SIZE) + SIZE, g)
    if signal(written[3] + 2 * sizes[3] + 1 + split_tile) == parts - 1:
        a, g = tl.zeros((TILE, TILE), tl.float32), tl.zeros((TILE, TILE), tl.float32)
        for other in range(parts):
            a += tl.load(parts_ptr + other * (2 * SIZE), cache_modifier=".cg")
            g += tl.load(parts_ptr + other * (2 * SIZE) + SIZE, cache_modifier=".cg")
        tile_sums(a, g, norms, written, sizes, site[2], where, SYMMETRIC, ONE, TILE)
