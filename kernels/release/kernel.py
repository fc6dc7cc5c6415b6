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

# 1024 elements of 8 samples a step: 8 loads in flight for every element of the result.
QUADS_PER_PROGRAM = 256
ROWS_PER_STEP = 8


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
    outs = [torch.empty(x.shape[1:], dtype=out_dtype, device=x.device) for x in samples]
    rows = weights.shape[0]
    with torch.cuda.device_of(weights):
        for position, (x, out) in enumerate(zip(samples, outs, strict=True)):
            numel = out.numel()
            if numel == 0:
                continue
            x = x if x[:1].is_contiguous() else x.contiguous()
            _release_kernel[(triton.cdiv(numel, 4 * QUADS_PER_PROGRAM),)](
                x,
                weights,
                key,
                scalars,
                out,
                numel,
                rows,
                x.stride(0),
                first_stream + position,
                BLOCK_HIGH_BITS=BLOCK_HIGH_BITS,
                FLOAT64=x.dtype == torch.float64,
                QUADS=QUADS_PER_PROGRAM,
                ROWS=ROWS_PER_STEP,
            )
    return outs


@triton.jit(do_not_specialize=["stream", "rows"])
def _release_kernel(
    samples_ptr,
    weights_ptr,
    key_ptr,
    scalars_ptr,
    out_ptr,
    numel,
    rows,
    row_stride,
    stream,
    BLOCK_HIGH_BITS: tl.constexpr,
    FLOAT64: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum, noise and scale the elements of QUADS Philox blocks a program."""
    compute: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * QUADS
    element = first * 4 + tl.arange(0, 4 * QUADS)
    inside = element < numel

    total = tl.zeros((4 * QUADS,), compute)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        weight = tl.load(weights_ptr + row, mask=row < rows, other=0.0)
        used = weight != 0.0
        value = tl.load(
            samples_ptr + row.to(tl.int64)[:, None] * row_stride + element[None, :],
            mask=used[:, None] & inside[None, :],
            other=0.0,
        )
        # Samples of weight 0 are not even loaded: 0·NaN is NaN.
        total += tl.sum(value.to(compute) * weight.to(compute)[:, None], axis=0)

    noise_scale = tl.load(scalars_ptr + 1)
    inv_expected_batch_size = tl.load(scalars_ptr + 2)
    noise = tl.zeros((4 * QUADS,), tl.float32)
    if noise_scale != 0.0:
        block = first + tl.arange(0, QUADS)
        z0, z1, z2, z3 = _normals(block, key_ptr, stream, BLOCK_HIGH_BITS)
        noise = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3)) * noise_scale
    result = (total + noise) * inv_expected_batch_size
    tl.store(out_ptr + element, result.to(out_ptr.dtype.element_ty), mask=inside)
