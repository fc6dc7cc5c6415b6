"""From tensors to the kernel: what runs together, and how much a program does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashnorm_compile.kernels.division import cdiv
from flashnorm_compile.kernels.noise.reference import BLOCK_HIGH_BITS
from flashnorm_compile.kernels.records import LENGTHS, encode_records, triton_dtype
from flashnorm_compile.kernels.release.kernel import release_kernel

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
            for first in range(0, len(tensors), LENGTHS[-1]):
                chunk = tensors[first : first + LENGTHS[-1]]
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
        records.append((programs, x.data_ptr(), out.data_ptr(), numel, x.stride(0), stream))
        programs += cdiv(numel, 4 * quads * steps)
    codes = encode_records(records, programs)
    release_kernel[(programs,)](
        codes,
        weights,
        key,
        scalars,
        rows,
        steps,
        LENGTH=len(codes),
        BLOCK_HIGH_BITS=BLOCK_HIGH_BITS,
        DTYPE=triton_dtype(dtype),
        OUT_DTYPE=triton_dtype(out_dtype),
        ALIGNED=aligned,
        QUADS=quads,
        ROWS=rows_per_step,
        num_warps=NUM_WARPS,
    )


def quads_per_step(rows_per_step: int, dtype: torch.dtype) -> int:
    """Return how many Philox blocks a program makes at once."""
    per_thread = 2 if rows_per_step == 1 else max(1, 4 // dtype.itemsize)
    return 32 * NUM_WARPS * per_thread
