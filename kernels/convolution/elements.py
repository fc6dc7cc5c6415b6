"""Convolution gradients by sample for any strides, in Triton: the address of every element.

For inputs of few channels, such as images, and for GPUs that cannot read boxes of tensors.
"""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from flashnorm_compile.kernels.convolution.tiles import (
    STORE,
    UNSPECIALIZED,
    WEIGHT,
    add_weighted,
    square,
    write,
    zeros,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def elements_kernel(
    gradient_ptr,
    input_ptr,
    weights_ptr,
    out_ptr,
    squares_ptr,
    samples,
    parts,
    units_each,
    outer,
    inner,
    rows,
    height,
    width,
    gradient_sample: tl.int64,
    gradient_channel: tl.int64,
    gradient_row: tl.int64,
    gradient_column: tl.int64,
    input_sample: tl.int64,
    input_channel: tl.int64,
    input_row: tl.int64,
    input_column: tl.int64,
    COLUMNS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GROUPS: tl.constexpr,
    MODE: tl.constexpr,
    GRADIENT_ALONG: tl.constexpr,
    INPUT_ALONG: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one tile for ``units_each`` units. The grid is (tiles, ranges of units).

    Args as in `boxes.boxes_kernel`, but for: strides of channels; COLUMNS, a constant that is
    divided by; GRADIENT_ALONG and INPUT_ALONG, whether neighbours in memory are "positions" or
    "channels"; BLOCK_C, columns of the weight [O, kernel·C/GROUPS]; BLOCK_P, positions.
    """
    tile = tl.program_id(0)
    kernel: tl.constexpr = KERNEL_H * KERNEL_W
    outer_each, inner_each = outer // GROUPS, inner // GROUPS
    width_each = inner_each * kernel
    outer_blocks, inner_blocks = tl.cdiv(outer_each, BLOCK_O), tl.cdiv(width_each, BLOCK_C)
    first_column = tile % inner_blocks * BLOCK_C
    block = tile // inner_blocks
    first_o = block % outer_blocks * BLOCK_O
    group = block // outer_blocks

    o = first_o + tl.arange(0, BLOCK_O)
    o_inside = o < outer_each
    o_offset = (group * outer_each + o).to(tl.int64) * gradient_channel
    # Columns of the weight: where each begins to read.
    column = first_column + tl.arange(0, BLOCK_C)
    tap, c = column // inner_each, column % inner_each
    c_inside = column < width_each
    begin_h = tap // KERNEL_W * DILATION_H - PADDING_H
    begin_w = tap % KERNEL_W * DILATION_W - PADDING_W
    c_offset = (group * inner_each + c).to(tl.int64) * input_channel
    c_offset += begin_h * input_row + begin_w * input_column

    positions = rows * COLUMNS
    positions_each = tl.cdiv(tl.cdiv(positions, BLOCK_P), parts) * BLOCK_P
    begin = tl.program_id(1) * units_each
    end = tl.minimum(begin + units_each, samples * parts)
    sums = zeros(1, BLOCK_O, BLOCK_C)
    for i in range(begin, end):
        # The interpreter counts in Python's integers.
        unit = tl.cast(i, tl.int32)
        sample = unit // parts
        first = (unit - sample * parts) * positions_each
        gradient_begin = gradient_ptr + sample.to(tl.int64) * gradient_sample
        input_begin = input_ptr + sample.to(tl.int64) * input_sample
        product = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
        for start in range(first, tl.minimum(first + positions_each, positions), BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            h, w = p // COLUMNS, p % COLUMNS
            p_inside = p < positions
            offset = h.to(tl.int64) * gradient_row + w * gradient_column
            if GRADIENT_ALONG == "positions":
                mask = o_inside[:, None] & p_inside[None, :]
                offset = o_offset[:, None] + offset[None, :]
                left = tl.load(gradient_begin + offset, mask=mask, other=0.0)
            else:
                mask = p_inside[:, None] & o_inside[None, :]
                offset = offset[:, None] + o_offset[None, :]
                left = tl.load(gradient_begin + offset, mask=mask, other=0.0).T
            h, w = h * STRIDE_H, w * STRIDE_W
            offset = h.to(tl.int64) * input_row + w * input_column
            if INPUT_ALONG == "positions":
                y, x = begin_h[:, None] + h[None, :], begin_w[:, None] + w[None, :]
                mask = c_inside[:, None] & p_inside[None, :]
                mask = mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
                offset = c_offset[:, None] + offset[None, :]
                right = tl.load(input_begin + offset, mask=mask, other=0.0).T
            else:
                y, x = h[:, None] + begin_h[None, :], w[:, None] + begin_w[None, :]
                mask = p_inside[:, None] & c_inside[None, :]
                mask = mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
                offset = offset[:, None] + c_offset[None, :]
                right = tl.load(input_begin + offset, mask=mask, other=0.0)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            product = tl.dot(left, right, product, input_precision=PRECISION)
        if MODE == WEIGHT:
            sums = add_weighted(sums, (product,), tl.load(weights_ptr + sample), 1)
        else:
            place = tile.to(tl.int64) * (samples * parts) + unit
            dtype: tl.constexpr = out_ptr.dtype.element_ty if MODE == STORE else tl.float32
            tl.store(
                squares_ptr + place,
                square((product,), dtype, outer_each - first_o, width_each - first_column, 1),
            )
            if MODE == STORE:
                write(
                    out_ptr, (product,), unit, group, first_o, first_column, 0, outer_each,
                    width_each, GROUPS, 1, 1,
                )  # fmt: skip
    if MODE == WEIGHT:
        write(
            out_ptr, sums, tl.program_id(1), group, first_o, first_column, 0, outer_each,
            width_each, GROUPS, 1, 1,
        )  # fmt: skip
