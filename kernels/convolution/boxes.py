"""Convolution gradients by sample on GPUs that read boxes of tensors (Hopper and later), in Triton.

The patches of one element of the weight are the input, shifted: boxes of a tensor descriptor over
[B, H, W, C]. What lies outside reads as zero, which is the padding; the convolution's stride is the
descriptor's. So no address is computed but those of boxes, and no patch is stored.
"""

# Triton gives kernel arguments their types, and tuples grow while loops are unrolled.
# mypy: allow-untyped-defs, disable-error-code=assignment

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

# Outside of every tensor.
_OUTSIDE = tl.constexpr(2**28)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def boxes_kernel(
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
    columns,
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
    TAPS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ONE_BOX: tl.constexpr,
    GRADIENT: tl.constexpr,
    INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one tile for ``units_each`` units. The grid is (tiles, ranges of units).

    Args:
        gradient_ptr: [samples, outer, rows, columns].
        input_ptr: [samples, inner, height, width].
        weights_ptr: float32 [samples]; for WEIGHT.
        out_ptr: row-major: for STORE [units, outer, kernel, inner/GROUPS], for WEIGHT float32
            [ranges, outer, kernel, inner/GROUPS], to be added up.
        squares_ptr: float32 [tiles, units], to be added up; for STORE and SQUARE.
        samples: B.
        parts: units of a sample; 1 for SQUARE.
        units_each: how many a program takes.
        outer: channels of the gradient.
        inner: channels of the input.
        rows: of the gradient.
        columns: of the gradient.
        height: of the input.
        width: of the input.
        gradient_sample: a stride, as the next ones.
        gradient_channel: a stride.
        gradient_row: a stride.
        gradient_column: a stride.
        input_sample: a stride.
        input_channel: a stride.
        input_row: a stride.
        input_column: a stride.
        KERNEL_H: of the convolution, as the next ones.
        KERNEL_W: width of the weight.
        STRIDE_H: stride.
        STRIDE_W: stride.
        PADDING_H: zeros on both sides.
        PADDING_W: zeros on both sides.
        DILATION_H: distance of the weight's elements.
        DILATION_W: distance of the weight's elements.
        GROUPS: of channels.
        MODE: STORE, SQUARE or WEIGHT.
        TAPS: elements of the weight's row that a program takes: all (up to 4), or 1.
        BLOCK_O: channels of the gradient in a tile.
        BLOCK_C: channels of the input in a tile.
        BLOCK_H: rows of a box of positions.
        BLOCK_W: columns of a box.
        ONE_BOX: whether a box holds all positions.
        GRADIENT: "channels" or "positions", by which lie side by side, where the positions in a box
            are a range: it has one row, or full ones; else "elements", channels side by side.
        INPUT: "channels", or for a 1x1 weight on one row without stride and padding "positions".
        PRECISION: of float32 products.
        UPCAST: multiply in float32 (the interpreter cannot multiply bfloat16).
    """
    # Programs side by side share what they read.
    tile = tl.program_id(0)
    chunks: tl.constexpr = KERNEL_H * KERNEL_W // TAPS
    outer_each, inner_each = outer // GROUPS, inner // GROUPS
    outer_blocks, inner_blocks = tl.cdiv(outer_each, BLOCK_O), tl.cdiv(inner_each, BLOCK_C)
    first_tap = tile % chunks * TAPS
    first_c = tile // chunks % inner_blocks * BLOCK_C
    block = tile // (chunks * inner_blocks)
    first_o = block % outer_blocks * BLOCK_O
    group = block // outer_blocks

    POSITIONS: tl.constexpr = BLOCK_H * BLOCK_W
    if GRADIENT == "channels":
        gradients = tl.make_tensor_descriptor(
            gradient_ptr,
            [samples, rows * columns, outer],
            [gradient_sample, gradient_column, 1],
            [1, POSITIONS, BLOCK_O],
        )
    elif GRADIENT == "positions":
        gradients = tl.make_tensor_descriptor(
            gradient_ptr,
            [samples, outer, rows * columns],
            [gradient_sample, gradient_channel, 1],
            [1, BLOCK_O, POSITIONS],
        )
    else:
        gradients = gradient_ptr
    offset_h, shift_h, size_h = _shift(
        first_tap // KERNEL_W, height, rows, STRIDE_H, PADDING_H, DILATION_H
    )
    inputs, shifts_w = (), ()
    for tap in tl.static_range(TAPS):
        offset_w, shift_w, size_w = _shift(
            first_tap % KERNEL_W + tap, width, columns, STRIDE_W, PADDING_W, DILATION_W
        )
        if INPUT == "positions":
            inputs += (
                tl.make_tensor_descriptor(
                    input_ptr,
                    [samples, inner, size_w],
                    [input_sample, input_channel, 1],
                    [1, BLOCK_C, POSITIONS],
                ),
            )
        else:
            inputs += (
                tl.make_tensor_descriptor(
                    input_ptr + (offset_h * input_row + offset_w * input_column),
                    [samples, size_h, size_w, inner],
                    [input_sample, input_row * STRIDE_H, input_column * STRIDE_W, 1],
                    [1, BLOCK_H, BLOCK_W, BLOCK_C],
                ),
            )
        shifts_w += (shift_w,)
    o, c = group * outer_each + first_o, group * inner_each + first_c
    boxes_w = tl.cdiv(columns, BLOCK_W)
    boxes = tl.cdiv(rows, BLOCK_H) * boxes_w
    boxes_each = tl.cdiv(boxes, parts)

    begin = tl.program_id(1) * units_each
    end = tl.minimum(begin + units_each, samples * parts)
    sums = zeros(TAPS, BLOCK_O, BLOCK_C)
    for i in range(begin, end):
        # The interpreter counts in Python's integers.
        unit = tl.cast(i, tl.int32)
        sample = unit // parts
        products = zeros(TAPS, BLOCK_O, BLOCK_C)
        if ONE_BOX:
            # Without a loop inside, Triton loads the next samples while it multiplies this one.
            products = _multiply(
                gradients, inputs, products, sample, 0, 0, shift_h, shifts_w, o, c, rows, columns,
                outer, gradient_sample, gradient_row, gradient_column, GRADIENT, INPUT,
                TAPS, BLOCK_O, BLOCK_C, BLOCK_H, BLOCK_W, PRECISION, UPCAST,
            )  # fmt: skip
        else:
            first_box = (unit - sample * parts) * boxes_each
            for box in range(first_box, tl.minimum(first_box + boxes_each, boxes)):
                row, column = box // boxes_w * BLOCK_H, box % boxes_w * BLOCK_W
                products = _multiply(
                    gradients, inputs, products, sample, row, column, shift_h, shifts_w, o, c,
                    rows, columns, outer, gradient_sample, gradient_row, gradient_column,
                    GRADIENT, INPUT,
                    TAPS, BLOCK_O, BLOCK_C, BLOCK_H, BLOCK_W, PRECISION, UPCAST,
                )  # fmt: skip
        if MODE == WEIGHT:
            sums = add_weighted(sums, products, tl.load(weights_ptr + sample), TAPS)
        else:
            place = tile.to(tl.int64) * (samples * parts) + unit
            dtype: tl.constexpr = out_ptr.dtype.element_ty if MODE == STORE else tl.float32
            tl.store(
                squares_ptr + place,
                square(products, dtype, outer_each - first_o, inner_each - first_c, TAPS),
            )
            if MODE == STORE:
                write(
                    out_ptr, products, unit, group, first_o, first_c, first_tap, outer_each,
                    inner_each, GROUPS, KERNEL_H * KERNEL_W, TAPS,
                )  # fmt: skip
    if MODE == WEIGHT:
        write(
            out_ptr, sums, tl.program_id(1), group, first_o, first_c, first_tap, outer_each,
            inner_each, GROUPS, KERNEL_H * KERNEL_W, TAPS,
        )  # fmt: skip


@triton.jit
def _shift(
    tap,
    size,
    positions,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
):
    """Return in one dim where an element of the weight reads.

    For position p that is element offset + stride·q of the input with q = p + shift, if q is at
    least 0 and less than the last value returned; else a zero.
    """
    # tap·DILATION - PADDING is stride·shift + offset.
    begin = tap * DILATION + PADDING * (STRIDE - 1)
    shift, offset = begin // STRIDE - PADDING, begin % STRIDE
    # What only positions behind the last would read is not read: it may be infinite.
    elements = tl.minimum((size - offset + STRIDE - 1) // STRIDE, positions + shift)
    # A descriptor cannot be empty.
    return offset, tl.where(elements > 0, shift, _OUTSIDE), tl.maximum(elements, 1)


@triton.jit
def _multiply(
    gradients,
    inputs,
    products,
    sample,
    row,
    column,
    shift_h,
    shifts_w,
    o,
    c,
    rows,
    columns,
    outer,
    gradient_sample,
    gradient_row,
    gradient_column,
    GRADIENT: tl.constexpr,
    INPUT: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the products with those of one more box of positions.

    The gradient is read once for all taps, and never by boxes of several rows: a transposed operand
    that was reshaped is kept in registers, which Triton 3.6 overwrites too early
    (https://github.com/triton-lang/triton/issues/9433).
    """
    POSITIONS: tl.constexpr = BLOCK_H * BLOCK_W
    first = row * columns + column
    if GRADIENT == "channels":
        left = gradients.load([sample, first, o]).reshape(POSITIONS, BLOCK_O).T
    elif GRADIENT == "positions":
        left = gradients.load([sample, o, first]).reshape(BLOCK_O, POSITIONS)
    else:
        position = tl.arange(0, POSITIONS)
        h, w = row + position // BLOCK_W, column + position % BLOCK_W
        channel = o + tl.arange(0, BLOCK_O)
        inside = ((h < rows) & (w < columns))[:, None] & (channel < outer)[None, :]
        offsets = h.to(tl.int64) * gradient_row + w * gradient_column
        begin = gradients + sample.to(tl.int64) * gradient_sample
        left = tl.load(begin + offsets[:, None] + channel[None, :], mask=inside, other=0.0).T
    if UPCAST:
        left = left.to(tl.float32)
    results = ()
    for tap in tl.static_range(TAPS):
        if INPUT == "positions":
            right = inputs[tap].load([sample, c, column]).reshape(BLOCK_C, POSITIONS).T
        else:
            right = inputs[tap].load([sample, row + shift_h, column + shifts_w[tap], c])
            right = right.reshape(POSITIONS, BLOCK_C)
        if UPCAST:
            right = right.to(tl.float32)
        results += (tl.dot(left, right, products[tap], input_precision=PRECISION),)
    return results
