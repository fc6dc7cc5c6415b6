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

from flashnorm_compile.kernels.release.kernel import _decode

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
        sites: LENGTH records of codes, see `_decode`: the first tile of the site, the addresses of
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
    site = _find(sites, tl.program_id(0), LENGTH)
    tile = tl.program_id(0) - _decode(site[0]).to(tl.int32)
    out_ptr = tl.multiple_of(_decode(site[3]).to(tl.pointer_type(tl.float32)), 16)
    m, n, tokens = (
        _decode(site[4]).to(tl.int32), _decode(site[5]).to(tl.int32), _decode(site[6]).to(tl.int32)
    )  # fmt: skip
    left = _operand(
        site[1], site[7], site[8], site[9], samples, tokens, m, DTYPE, LEFT, DESCRIPTORS, BLOCK_T,
        BLOCK_M,
    )  # fmt: skip
    right = _operand(
        site[2], site[10], site[11], site[12], samples, tokens, n, DTYPE, RIGHT, DESCRIPTORS,
        BLOCK_T, BLOCK_N,
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
        x = _load(left, source, token, row, samples, tokens, m, LEFT, DESCRIPTORS, BLOCK_T, BLOCK_M)
        y = _load(
            right, source, token, column, samples, tokens, n, RIGHT, DESCRIPTORS, BLOCK_T, BLOCK_N
        )
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
def _find(sites, tile, LENGTH: tl.constexpr):
    """Return the record of the tile's site, the last that starts at or before the tile.

    By unrolled selections: an argument cannot be indexed at run time.
    """
    site = sites[0]
    for k in tl.static_range(1, LENGTH):
        later = tile >= _decode(sites[k][0])
        fields = (tl.where(later, sites[k][0], site[0]),)
        for field in tl.static_range(1, len(site)):
            fields += (tl.where(later, sites[k][field], site[field]),)  # type: ignore[assignment]
        site = fields
    return site


@triton.jit
def _place(tile, rows, columns):
    """Return row and column of a tile: some rows by all columns, then the next rows."""
    group = tile // (_GROUP * columns)
    first = group * _GROUP
    height = tl.minimum(rows - first, _GROUP)
    inside = tile - group * _GROUP * columns
    return first + inside % height, inside // height


@triton.jit
def _operand(
    address,
    sample_stride,
    token_stride,
    place_stride,
    samples,
    tokens,
    width,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return what `_load` loads from: a descriptor, or a pointer and strides.

    A descriptor's box ends where its sample ends, and is filled with 0.
    """
    ptr = _decode(address).to(tl.pointer_type(DTYPE))
    sample_stride = _decode(sample_stride)
    token_stride = _decode(token_stride)
    place_stride = _decode(place_stride)
    if DESCRIPTORS and MODE == "places":
        return tl.make_tensor_descriptor(
            ptr, [samples, tokens, width], [sample_stride, token_stride, 1], [1, BLOCK_T, BLOCK]
        )
    elif DESCRIPTORS and MODE == "tokens":
        return tl.make_tensor_descriptor(
            ptr, [samples, width, tokens], [sample_stride, place_stride, 1], [1, BLOCK, BLOCK_T]
        )
    else:
        vector: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        if MODE != "any":
            ptr = tl.multiple_of(ptr, 16)
            sample_stride = sample_stride // vector * vector
        if MODE == "places":
            token_stride, place_stride = token_stride // vector * vector, 1
        if MODE == "tokens":
            token_stride, place_stride = 1, place_stride // vector * vector
        return ptr, sample_stride, token_stride, place_stride


@triton.jit
def _load(
    operand,
    sample,
    token,
    place,
    samples,
    tokens,
    width,
    MODE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return [BLOCK_T, BLOCK] of a sample from a token and place on; 0 outside."""
    if DESCRIPTORS and MODE == "places":
        return operand.load([sample, token, place]).reshape(BLOCK_T, BLOCK)
    elif DESCRIPTORS and MODE == "tokens":
        return operand.load([sample, place, token]).reshape(BLOCK, BLOCK_T).T
    else:
        ptr, sample_stride, token_stride, place_stride = operand
        vector: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        # A mask that may end anywhere makes the compiler read single elements.
        if MODE == "places":
            width = width // vector * vector
        if MODE == "tokens":
            tokens = tokens // vector * vector
        t = (token + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        i = (place + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        inside = (t < tokens) & (i < width) & (sample < samples)
        start = ptr + sample.to(tl.int64) * sample_stride
        return tl.load(start + t * token_stride + i * place_stride, mask=inside, other=0.0)
