"""The release on CUDA devices, in Triton: every per-sample gradient is read once."""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from flashnorm_compile.kernels.noise.kernel import normals
from flashnorm_compile.kernels.records import decode, find_record


@triton.jit(do_not_specialize=["weights_ptr", "key_ptr", "scalars_ptr", "rows", "steps"])
def release_kernel(
    tensors,
    weights_ptr,
    key_ptr,
    scalars_ptr,
    rows,
    steps,
    LENGTH: tl.constexpr,
    BLOCK_HIGH_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum, noise and scale a part of one tensor: ``steps`` times QUADS Philox blocks.

    ``tensors`` holds LENGTH records of codes, see `records`: the first program of the tensor, the
    addresses of samples and result, the number of elements, the row stride and the stream. ALIGNED
    tensors are read and written 16 bytes at once. ROWS is 1 if ``rows`` is; else ROWS rows are read
    at once.
    """
    noise_scale = tl.load(scalars_ptr + 1)
    inv_expected_batch_size = tl.load(scalars_ptr + 2)
    seed, release = tl.load(key_ptr), tl.load(key_ptr + 1)

    program = tl.program_id(0)
    start, samples, out, numel, row_stride, stream = find_record(tensors, program, 0, LENGTH)
    start, numel, row_stride, stream = (
        decode(start), decode(numel), decode(row_stride), decode(stream)
    )  # fmt: skip
    samples_ptr = decode(samples).to(tl.pointer_type(DTYPE))
    out_ptr = decode(out).to(tl.pointer_type(OUT_DTYPE))
    if ALIGNED:
        samples_ptr = tl.multiple_of(samples_ptr, 16)
        out_ptr = tl.multiple_of(out_ptr, 16)
        vector: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        row_stride = row_stride // vector * vector

    begin = (program - start) * steps * QUADS
    end = tl.minimum(begin + steps * QUADS, (numel + 3) // 4)
    if ROWS == 1:
        weight = tl.load(weights_ptr + tl.arange(0, 1))
    for first in range(begin, end, QUADS):
        element = first * 4 + tl.arange(0, 4 * QUADS)
        # A mask that may end anywhere makes the compiler read and write single elements.
        whole = (first + QUADS) * 4 <= numel
        if whole:
            inside = element >= 0
            if ROWS == 1:
                total = tl.load(samples_ptr + element, mask=inside & (weight != 0.0), other=0.0)
            else:
                total = _weighted_sum(
                    samples_ptr, weights_ptr, rows, row_stride, element, inside, ROWS
                )
        else:
            inside = element < numel
            if ROWS == 1:
                total = tl.load(samples_ptr + element, mask=inside & (weight != 0.0), other=0.0)
            else:
                total = _weighted_sum(
                    samples_ptr, weights_ptr, rows, row_stride, element, inside, ROWS
                )

        noise = tl.zeros((4 * QUADS,), tl.float32)
        if noise_scale != 0.0:
            block = first + tl.arange(0, QUADS)
            z0, z1, z2, z3 = normals(block, seed, release, stream, BLOCK_HIGH_BITS)
            noise = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3)) * noise_scale
        if ROWS == 1:
            # Only now: the noise is made while the row is on its way.
            compute: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
            total = total.to(compute) * weight.to(compute)
        result = ((total + noise) * inv_expected_batch_size).to(OUT_DTYPE)

        if whole:
            tl.store(out_ptr + element, result)
        else:
            tl.store(out_ptr + element, result, mask=element < numel)


@triton.jit
def _weighted_sum(
    samples_ptr,
    weights_ptr,
    rows,
    row_stride,
    element,
    inside,
    ROWS: tl.constexpr,
):
    """Return the sum over rows of the elements that are inside.

    Samples of weight 0 are not even loaded, here and above: 0·NaN is NaN.
    """
    compute: tl.constexpr = tl.float64 if samples_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros(element.shape, compute)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        weight = tl.load(weights_ptr + row, mask=row < rows, other=0.0)
        value = tl.load(
            samples_ptr + row.to(tl.int64)[:, None] * row_stride + element[None, :],
            mask=(weight != 0.0)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(value.to(compute) * weight.to(compute)[:, None], axis=0)
    return total
