"""Products by sample and their squared norms on CUDA devices, in Triton.

A program goes from tile to tile of the products, and sums each over the tokens in registers. Then
it adds up the tile's squares and writes one number; the tile itself only if asked for. What is
written for a tile does not depend on the program.
"""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from flashnorm_compile.kernels.loading import describe, load
from flashnorm_compile.kernels.records import decode, find_record, pointer

# Rows of tiles that are taken together, column by column: neighbours share what they read.
_GROUP: tl.constexpr = tl.constexpr(8)
# Columns of a matrix of ones, the fewest that are multiplied everywhere.
_ONES: tl.constexpr = tl.constexpr(16)


# What varies with the batch size is compiled for no particular integers.
@triton.jit(do_not_specialize=["samples", "splits", "steps"])
def products_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    squares_ptr,
    bias_ptr,
    samples,
    T,
    m,
    n,
    out_width,
    left_sample,
    left_token,
    left_place,
    right_sample,
    right_token,
    right_place,
    splits,
    steps,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Multiply left_b [m, T] by right_b [T, n] for all samples b.

    The tokens of a sample are summed in ``splits`` parts, each of ``steps`` times BLOCK_T tokens
    (SPLIT: there is more than one); part ``split`` of sample b has the number b·splits + split.

    Place i of token t of sample b is read at b·left_sample + t·left_token + i·left_place, where
    places are rows of the product; and in the same way from the right, where they are columns.
    LEFT and RIGHT say how: by a tensor descriptor where "places" or "tokens" lie side by side, by
    pointers for "any". OUT says how products are written to ``out`` [parts, m, out_width]: by a
    "descriptor", by "pointers", or "none".

    Unless SPLIT, ``squares`` [B, tiles] gets the sum of squares of each tile, in float32. For BIAS
    left is summed over tokens: ``bias`` gets the sums, [parts, m], if SPLIT; else the sums of
    their squares, [B, rows of tiles].

    PRECISION is that of float32 products. UPCAST is for the interpreter, which cannot multiply
    bfloat16.
    """
    sizes = (samples, m, out_width, tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N))
    left_strides = (left_sample, left_token, left_place)
    right_strides = (right_sample, right_token, right_place)
    left = describe(left_ptr, (samples, T, m), left_strides, LEFT, True, BLOCK_T, BLOCK_M)
    right = describe(right_ptr, (samples, T, n), right_strides, RIGHT, True, BLOCK_T, BLOCK_N)
    if OUT == "descriptor":
        out = tl.make_tensor_descriptor(
            out_ptr,
            [samples * splits, m, out_width],
            [tl.cast(m, tl.int64) * out_width, tl.cast(out_width, tl.int64), 1],
            [1, BLOCK_M, BLOCK_N // 2],
        )
    else:
        out = out_ptr
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program, programs = tl.program_id(0), tl.num_programs(0)
    if BIAS:
        # The tiles of the first column sum left too. They have a loop of their own, which leaves
        # the other as it is.
        _tiles(
            left, right, out, squares_ptr, bias_ptr, sizes,
            splits, steps, rows, columns, 0, 1, program,
            LEFT, RIGHT, OUT, SPLIT, True, PRECISION, UPCAST, BLOCK_T, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        # Programs go on in turn.
        program = (program + programs - samples * splits * rows % programs) % programs
    _tiles(
        left, right, out, squares_ptr, bias_ptr, sizes,
        splits, steps, rows, columns, BIAS, columns - BIAS, program,
        LEFT, RIGHT, OUT, SPLIT, False, PRECISION, UPCAST, BLOCK_T, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "samples", "squares_width"])
def sites_kernel(
    sites,
    squares_ptr,
    count,
    samples,
    squares_width,
    LENGTH: tl.constexpr,
    DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write products of several sites, and the sums of squares of their tiles.

    A program takes its share of each site, one after the other; where one has a tile more than
    another, the next site begins with the other.

    Args:
        sites: LENGTH records of codes, see `records`: the position of the site; the addresses of
            left, right and out [B, m, n]; T, m and n; strides of samples, tokens and places of left
            and of right; and the site's first column in ``squares``.
        squares_ptr: float32 [B, squares_width], a column for each tile.
        count: sites.
        samples: B.
        squares_width: tiles of a sample, of all sites.
        LENGTH: of ``sites``.
        DTYPE: of operands and products, 16-bit.
        LEFT: "places" or "tokens", by which lie side by side.
        RIGHT: in the same way.
        UPCAST: multiply in float32 (the interpreter cannot multiply bfloat16).
        BLOCK_T: tokens that are multiplied at once.
        BLOCK_M: rows of a tile.
        BLOCK_N: columns of a tile.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    for k in range(count):
        site = find_record(sites, k, 0, LENGTH)
        T, m, n = (
            decode(site[4]).to(tl.int32), decode(site[5]).to(tl.int32), decode(site[6]).to(tl.int32)
        )  # fmt: skip
        left = describe(
            pointer(site[1], DTYPE, LEFT), (samples, T, m),
            (decode(site[7]), decode(site[8]), decode(site[9])),
            LEFT, True, BLOCK_T, BLOCK_M,
        )  # fmt: skip
        right = describe(
            pointer(site[2], DTYPE, RIGHT), (samples, T, n),
            (decode(site[10]), decode(site[11]), decode(site[12])),
            RIGHT, True, BLOCK_T, BLOCK_N,
        )  # fmt: skip
        out = tl.make_tensor_descriptor(
            pointer(site[3], DTYPE, LEFT), [samples, m, n],
            [m.to(tl.int64) * n, n.to(tl.int64), 1], [1, BLOCK_M, BLOCK_N // 2],
        )  # fmt: skip
        rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
        first_ptr = squares_ptr + decode(site[13])
        _tiles(
            left, right, out, first_ptr, first_ptr, (samples, m, n, squares_width),
            1, tl.cdiv(T, BLOCK_T), rows, columns, 0, columns, program,
            LEFT, RIGHT, "descriptor", False, False, "ieee", UPCAST, BLOCK_T, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        # Programs go on in turn.
        program = (program + programs - samples * rows * columns % programs) % programs


@triton.jit
def _tiles(
    left,
    right,
    out,
    squares_ptr,
    bias_ptr,
    sizes,
    splits,
    steps,
    rows,
    columns,
    first_column,
    width,
    first_item,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Make the program's share of the tiles in ``width`` columns of tiles from ``first_column``."""
    samples, m, out_width, squares_width = sizes
    # A flat loop reads the first steps of a tile during the last of the one before. With a second
    # sum in it, ptxas would wait for each product before it starts the next.
    for item in tl.range(
        first_item, samples * splits * rows * width, tl.num_programs(0), flatten=not BIAS
    ):
        # Samples follow each other; so do a sample's parts, and a part's tiles.
        part, tile = item // (rows * width), item % (rows * width)
        sample = part // splits
        begin = part % splits * steps
        group = tile // (_GROUP * width)
        height = tl.minimum(rows - group * _GROUP, _GROUP)
        tile -= group * _GROUP * width
        row, column = group * _GROUP + tile % height, first_column + tile // height

        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        bias = tl.zeros((BLOCK_M, _ONES), tl.float32)
        for step in range(steps):
            t = (begin + step) * BLOCK_T
            x = load(left, sample, t, row * BLOCK_M, LEFT, True, BLOCK_T, BLOCK_M)
            y = load(right, sample, t, column * BLOCK_N, RIGHT, True, BLOCK_T, BLOCK_N)
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            total = tl.dot(x.T, y, total, input_precision=PRECISION)
            if BIAS:
                ones = tl.full((BLOCK_T, _ONES), 1.0, x.dtype)
                bias = tl.dot(x.T, ones, bias, input_precision="ieee")

        if OUT == "none":
            squares = tl.sum(total * total)
        else:
            # In halves: they go through shared memory, which the operands need.
            first, second = total.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
            i, j = row * BLOCK_M, column * BLOCK_N
            first = _store(out, first, part, i, j, m, out_width, OUT)
            second = _store(out, second, part, i, j + BLOCK_N // 2, m, out_width, OUT)
            squares = tl.sum(first * first + second * second)
        if not SPLIT:
            tl.store(squares_ptr + sample * squares_width + row * columns + column, squares)
        if BIAS:
            # Every column of ``bias`` holds the same sums.
            if SPLIT:
                place = row * BLOCK_M + tl.arange(0, BLOCK_M)
                sums = tl.sum(bias, 1) / _ONES
                tl.store(bias_ptr + tl.cast(part, tl.int64) * m + place, sums, mask=place < m)
            else:
                tl.store(bias_ptr + sample * rows + row, tl.sum(bias * bias) / _ONES)


@triton.jit
def _store(out, tile, part, first_row, first_column, m, width, OUT: tl.constexpr):
    """Write a part of a product; return it as it was rounded, in float32."""
    if OUT == "descriptor":
        tile = tile.to(out.dtype)
        out.store([part, first_row, first_column], tile.reshape(1, tile.shape[0], tile.shape[1]))
    else:
        tile = tile.to(out.dtype.element_ty)
        rows = first_row + tl.arange(0, tile.shape[0])[:, None]
        columns = first_column + tl.arange(0, tile.shape[1])[None, :]
        offsets = (tl.cast(part, tl.int64) * m + rows) * width + columns
        tl.store(out + offsets, tile, mask=(rows < m) & (columns < width))
    return tile.to(tl.float32)


@triton.jit(do_not_specialize=["splits", "chunks"])
def add_parts_kernel(
    parts_ptr,
    out_ptr,
    squares_ptr,
    splits,
    chunks,
    size,
    width,
    n,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts of a sum in turn, and square it: BLOCK numbers a program.

    ``parts`` [B, splits, size] and ``squares`` [B, chunks] are float32. For STORE, the sums go to
    ``out`` [B, size / width, n], without the last numbers of each row if n < width, and the squares
    are those of what is stored.
    """
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    place = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        offsets = (sample * splits + split) * size + place
        total += tl.load(parts_ptr + offsets, mask=inside, other=0.0)
    if STORE:
        rounded = total.to(out_ptr.dtype.element_ty)
        row, column = place // width, place % width
        offsets = sample * (size // width) * n + row * n + column
        tl.store(out_ptr + offsets, rounded, mask=inside & (column < n))
        total = rounded.to(tl.float32)
    tl.store(squares_ptr + program, tl.sum(total * total))
