"""The release on CUDA devices, in Triton: every per-sample gradient is read once."""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashnorm_compile.kernels.noise.kernel import _normals
from flashnorm_compile.kernels.noise.reference import BLOCK_HIGH_BITS

# Tensors of one launch: a call is cut into the longest of these, and its rest is padded to the
# next, so that few variants are compiled. 32 records take 1.5 of the 4 KiB a launch may pass.
CHUNK_LENGTHS = (1, 8, 32)
# Of 8 rows at once a thread holds the same 16 bytes of each, so that no sum crosses threads; of the
# only row two Philox blocks, of 4 elements each.
ROWS_PER_STEP = 8
# To find its tensor, a program of 32 tensors loads some 280 constants, and these loads are slow: of
# a large tensor it makes many steps. Of a small one few, for they follow one another.
LARGE = 2**20
STEPS_PER_PROGRAM = {
    (1, False): 16,
    (1, True): 32,
    (ROWS_PER_STEP, False): 2,
    (ROWS_PER_STEP, True): 16,
}
NUM_WARPS = 4

# Added by `_code`; a code is odd and 2**62 or more.
_CODE_BASE: tl.constexpr = tl.constexpr(2**61)

# Samples, result, stream.
_Tensor = tuple[Tensor, Tensor, int]


def release(
    samples: Sequence[Tensor],
    weights: Tensor,
    key: Tensor,
    scalars: Tensor,
    first_stream: int,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """`op.release` for CUDA tensors. Does not synchronise with the host.

    Samples may lie apart (a slice of a padded tensor); each must be row-major, or is copied.
    """
    weights, key, scalars = weights.contiguous(), key.contiguous(), scalars.contiguous()
    outs = [x.new_empty(x.shape[1:], dtype=out_dtype) for x in samples]
    rows = weights.shape[0]
    groups: dict[tuple[torch.dtype, bool, bool], list[_Tensor]] = {}
    for position, (x, out) in enumerate(zip(samples, outs, strict=True)):
        if out.numel() > 0:
            # The first test is cheap and most often enough.
            row_major = x.is_contiguous() or x[:1].is_contiguous()
            x = x if row_major else x.contiguous()
            group = (x.dtype, _is_aligned(x, out), out.numel() >= LARGE)
            groups.setdefault(group, []).append((x, out, first_stream + position))
    with torch.cuda.device_of(weights):
        for (dtype, aligned, large), tensors in groups.items():
            for first in range(0, len(tensors), CHUNK_LENGTHS[-1]):
                chunk = tensors[first : first + CHUNK_LENGTHS[-1]]
                _launch(chunk, weights, key, scalars, rows, dtype, out_dtype, aligned, large)
    return outs


def _is_aligned(x: Tensor, out: Tensor) -> bool:
    """Whether every row and the result start at a multiple of 16 bytes."""
    row_bytes = x.stride(0) * x.element_size() if x.shape[0] > 1 else 0
    return (x.data_ptr() | out.data_ptr() | row_bytes) % 16 == 0


def _launch(
    tensors: list[_Tensor],
    weights: Tensor,
    key: Tensor,
    scalars: Tensor,
    rows: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    aligned: bool,
    large: bool,
) -> None:
    """Release a chunk of tensors, none of them empty, all of them large or none."""
    rows_per_step = 1 if rows == 1 else ROWS_PER_STEP
    quads = quads_per_step(rows_per_step, dtype)
    steps = STEPS_PER_PROGRAM[rows_per_step, large]
    programs = 0
    records: list[tuple[int, ...]] = []
    for x, out, stream in tensors:
        numel = out.numel()
        fields = (programs, x.data_ptr(), out.data_ptr(), numel, x.stride(0), stream)
        records.append(tuple(map(_code, fields)))
        programs += triton.cdiv(numel, 4 * quads * steps)
    length = next(length for length in CHUNK_LENGTHS if length >= len(records))
    # No program is left for what pads the chunk.
    padding = (_code(programs), *records[-1][1:])
    records += [padding] * (length - len(records))
    _release_kernel[(programs,)](
        tuple(records),
        weights,
        key,
        scalars,
        rows,
        steps,
        LENGTH=length,
        BLOCK_HIGH_BITS=BLOCK_HIGH_BITS,
        DTYPE=_triton_dtype(dtype),
        OUT_DTYPE=_triton_dtype(out_dtype),
        ALIGNED=aligned,
        QUADS=quads,
        ROWS=rows_per_step,
        num_warps=NUM_WARPS,
    )


def quads_per_step(rows_per_step: int, dtype: torch.dtype) -> int:
    """Return how many Philox blocks a program makes at once."""
    per_thread = 2 if rows_per_step == 1 else max(1, 4 // dtype.itemsize)
    return 32 * NUM_WARPS * per_thread


def _code(value: int) -> int:
    """Return an integer that Triton compiles for as for any other.

    Triton 3.6 compiles a kernel again if an integer in a tuple becomes 1, a multiple of 16 or
    longer than 32 bits; ``do_not_specialize`` does not reach into tuples. Addresses go this way
    too: as tensors they would cost the launch a query to the driver each.
    """
    return 2 * (value + 2**61) + 1


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit(do_not_specialize=["weights_ptr", "key_ptr", "scalars_ptr", "rows", "steps"])
def _release_kernel(
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

    ``tensors`` holds LENGTH records of codes: the first program of the tensor, the addresses of
    samples and result, the number of elements, the row stride and the stream. ALIGNED tensors are
    read and written 16 bytes at once. ROWS is 1 if ``rows`` is; else ROWS rows are read at once.
    """
    noise_scale = tl.load(scalars_ptr + 1)
    inv_expected_batch_size = tl.load(scalars_ptr + 2)
    seed, release = tl.load(key_ptr), tl.load(key_ptr + 1)

    program = tl.program_id(0)
    start, samples, out, numel, row_stride, stream = _find(tensors, program, 0, LENGTH)
    samples_ptr = samples.to(tl.pointer_type(DTYPE))
    out_ptr = out.to(tl.pointer_type(OUT_DTYPE))
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
            z0, z1, z2, z3 = _normals(block, seed, release, stream, BLOCK_HIGH_BITS)
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
def _find(tensors, program, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Return the record of the program's tensor, the last that starts at or before the program.

    By unrolled selections: an argument cannot be indexed at run time.
    """
    if HIGH - LOW == 1:
        start, samples, out, numel, row_stride, stream = tensors[LOW]
        return (
            _decode(start), _decode(samples), _decode(out),
            _decode(numel), _decode(row_stride), _decode(stream),
        )  # fmt: skip
    else:
        MIDDLE: tl.constexpr = (LOW + HIGH) // 2
        start, samples, out, numel, row_stride, stream = _find(tensors, program, LOW, MIDDLE)
        start_, samples_, out_, numel_, row_stride_, stream_ = _find(tensors, program, MIDDLE, HIGH)
        # The low words of codes compare as what they stand for.
        later = program * 2 + 1 >= tensors[MIDDLE][0].to(tl.int32)
        return (
            tl.where(later, start_, start),
            tl.where(later, samples_, samples),
            tl.where(later, out_, out),
            tl.where(later, numel_, numel),
            tl.where(later, row_stride_, row_stride),
            tl.where(later, stream_, stream),
        )


@triton.jit
def _decode(code):
    """Undo `_code`."""
    return (code >> 1) - _CODE_BASE


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
