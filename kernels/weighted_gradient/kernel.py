"""The weighted gradient on CUDA devices, in Triton: neither operand is copied or rounded.

A program sums one tile of the result in registers, over all samples or a part of them. One set of
sums serves, so that a tile may take all registers: it is held in units of the weight of the sample
that is being added,

    sums = Σ_j w_j·(L_j R_j) / scale,    scale = w_b up to rounding,

and where a sample ends, it is multiplied by scale / w_b', with b' the next sample. Samples follow
one another in one loop, so that the first tokens of one are loaded during the last of the one
before. Samples of weight 0 are not loaded: what lies outside of an operand reads as 0, so they are
looked for behind the last sample.
"""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from flashnorm_compile.kernels.loading import describe, load
from flashnorm_compile.kernels.records import decode, find_record, pointer

# Rows of tiles that run together: with 128 x 256 those of an H100 then make a square of a result.
_GROUP: tl.constexpr = tl.constexpr(16)


@triton.jit(do_not_specialize=["weights_ptr", "samples", "splits"])
def weighted_gradients_kernel(
    sites,
    weights_ptr,
    samples,
    splits,
    LENGTH: tl.constexpr,
    DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write Σ_b weights[b]·(left_b @ right_b) of one tile of a site, and one part of the tokens.

    The grid is (tiles of all sites, splits).

    Args:
        sites: LENGTH records of codes, see `records`: the first tile of the site, the addresses of
            left, right and out, m, n, T, and strides of samples, tokens and places of left and of
            right. ``out`` is [splits, m, n] float32; its parts add up to the result.
        weights_ptr: [samples] float32.
        samples: B.
        splits: parts into which the tokens of all samples are cut; none is empty.
        LENGTH: how many sites there are.
        DTYPE: of left and right.
        LEFT: "places" or "tokens", by which lie side by side: then addresses and other strides
            are multiples of 16 bytes. "any" promises nothing.
        RIGHT: in the same way.
        DESCRIPTORS: whether operands of which something is promised are read through tensor
            descriptors. Otherwise the size of what lies side by side is a multiple of 16 bytes.
        ALIGNED: whether every n is a multiple of 4.
        PRECISION: of float32 products.
        UPCAST: multiply in float32 (the interpreter cannot multiply bfloat16).
        BLOCK_M: rows of a tile.
        BLOCK_N: columns of a tile.
        BLOCK_T: tokens of one sample that are multiplied at once.
    """
    site = find_record(sites, tl.program_id(0), 0, LENGTH)
    tile = tl.program_id(0) - decode(site[0]).to(tl.int32)
    out_ptr = tl.multiple_of(decode(site[3]).to(tl.pointer_type(tl.float32)), 16)
    m, n, tokens = (
        decode(site[4]).to(tl.int32), decode(site[5]).to(tl.int32), decode(site[6]).to(tl.int32)
    )  # fmt: skip
    left = describe(
        pointer(site[1], DTYPE, LEFT), (samples, tokens, m),
        (decode(site[7]), decode(site[8]), decode(site[9])),
        LEFT, DESCRIPTORS, BLOCK_T, BLOCK_M,
    )  # fmt: skip
    right = describe(
        pointer(site[2], DTYPE, RIGHT), (samples, tokens, n),
        (decode(site[10]), decode(site[11]), decode(site[12])),
        RIGHT, DESCRIPTORS, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    row, column = _place(tile, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N))
    row, column = row * BLOCK_M, column * BLOCK_N

    split = tl.program_id(1)
    steps_per_sample = tl.cdiv(tokens, BLOCK_T)
    steps = tl.cast(samples * steps_per_sample, tl.int64)
    begin = tl.cast(split * steps // splits, tl.int32)
    end = tl.cast((split + 1) * steps // splits, tl.int32)

    sample = begin // steps_per_sample
    token = (begin - sample * steps_per_sample) * BLOCK_T
    weight = tl.load(weights_ptr + sample)
    source = tl.where(weight != 0.0, sample, samples)
    scale = tl.where(weight != 0.0, weight, 1.0).to(tl.float64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(begin, end):
        x = load(left, source, token, row, LEFT, DESCRIPTORS, BLOCK_T, BLOCK_M)
        y = load(right, source, token, column, RIGHT, DESCRIPTORS, BLOCK_T, BLOCK_N)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        sums = tl.dot(x.T, y, sums, input_precision=PRECISION)

        # Of the next step, one step ahead: loaded in the step itself, the weight would keep Triton
        # from loading the operands several steps ahead.
        token += BLOCK_T
        ended = token >= tokens
        token = tl.where(ended, 0, token)
        sample += ended.to(tl.int32)
        weight = tl.load(weights_ptr + sample, mask=sample < samples, other=0.0)
        source = tl.where(weight != 0.0, sample, samples)
        # After the product, not before: there it would wait for it in every step.
        unit = scale.to(tl.float32)
        if ended & (weight != 0.0) & (weight != unit):
            ratio = unit / weight
            sums *= ratio
            # What the ratio really makes of it: its rounding errors do not add up over samples.
            scale = scale / ratio.to(tl.float64)

    sums *= scale.to(tl.float32)
    if DESCRIPTORS and ALIGNED:
        out = tl.make_tensor_descriptor(
            out_ptr, [splits, m, n], [m.to(tl.int64) * n, n.to(tl.int64), 1], [1, BLOCK_M, BLOCK_N]
        )
        out.store([split, row, column], sums.reshape(1, BLOCK_M, BLOCK_N))
    else:
        i, j = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        out_ptr += (split.to(tl.int64) * m + i.to(tl.int64)[:, None]) * n + j[None, :]
        tl.store(out_ptr, sums, mask=(i < m)[:, None] & (j < n)[None, :])


@triton.jit
def _place(tile, rows, columns):
    """Return row and column of a tile: some rows by all columns, then the next rows."""
    group = tile // (_GROUP * columns)
    first = group * _GROUP
    height = tl.minimum(rows - first, _GROUP)
    inside = tile - group * _GROUP * columns
    return first + inside % height, inside // height
