"""The noise on CUDA devices, in Triton: one read of the sum, one write of the result."""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import BLOCK_HIGH_BITS

QUADS_PER_PROGRAM = 256


def add_noise(
    sum: Tensor, key: Tensor, scalars: Tensor, stream: int, out_dtype: torch.dtype
) -> Tensor:
    """`op.add_noise` for CUDA tensors. Does not synchronise with the host.

    A sum that is not row-major is copied first.
    """
    sum, key, scalars = sum.contiguous(), key.contiguous(), scalars.contiguous()
    out = torch.empty(sum.shape, dtype=out_dtype, device=sum.device)
    numel = sum.numel()
    if numel == 0:
        return out
    with torch.cuda.device_of(sum):
        _add_noise_kernel[(triton.cdiv(numel, 4 * QUADS_PER_PROGRAM),)](
            sum,
            key,
            scalars,
            out,
            numel,
            stream,
            BLOCK_HIGH_BITS=BLOCK_HIGH_BITS,
            FLOAT64=sum.dtype == torch.float64,
            QUADS=QUADS_PER_PROGRAM,
        )
    return out


@triton.jit(do_not_specialize=["stream"])
def _add_noise_kernel(
    sum_ptr,
    key_ptr,
    scalars_ptr,
    out_ptr,
    numel,
    stream,
    BLOCK_HIGH_BITS: tl.constexpr,
    FLOAT64: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Noise the elements of QUADS Philox blocks a program; `reference` has the formulas."""
    first = tl.program_id(0).to(tl.int64) * QUADS
    noise_scale = tl.load(scalars_ptr + 1)
    inv_expected_batch_size = tl.load(scalars_ptr + 2)

    noise = tl.zeros((4 * QUADS,), tl.float32)
    if noise_scale != 0.0:
        block = first + tl.arange(0, QUADS)
        z0, z1, z2, z3 = _normals(block, key_ptr, stream, BLOCK_HIGH_BITS)
        noise = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3)) * noise_scale

    element = first * 4 + tl.arange(0, 4 * QUADS)
    mask = element < numel
    value = tl.load(sum_ptr + element, mask=mask, other=0.0)
    value = value.to(tl.float64 if FLOAT64 else tl.float32)
    result = (value + noise) * inv_expected_batch_size
    tl.store(out_ptr + element, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normals(block, key_ptr, stream, BLOCK_HIGH_BITS: tl.constexpr):
    """Return the four normals of each Philox block."""
    seed = tl.load(key_ptr).to(tl.uint64, bitcast=True)
    release = tl.load(key_ptr + 1).to(tl.uint64, bitcast=True)
    c0 = block.to(tl.uint32)
    c1 = ((block >> 32) | (stream.to(tl.int64) << BLOCK_HIGH_BITS)).to(tl.uint32)
    c2 = tl.zeros_like(c0) + release.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (release >> 32).to(tl.uint32)
    x0, x1, x2, x3 = tl.philox(seed, c0, c1, c2, c3)
    z0, z1 = _box_muller(x0, x1)
    z2, z3 = _box_muller(x2, x3)
    return z0, z1, z2, z3


@triton.jit
def _box_muller(radius_word, angle_word):
    """Turn two uint32 words into two float32 normals."""
    radius = tl.sqrt(-2.0 * tl.log(_uniform(radius_word)))
    angle = 6.283185307179586 * _uniform(angle_word)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _uniform(word):
    """Map a uint32 word to (0, 1] in float32; 2.3283064365386963e-10 is 2**-32."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
