"""Copies between layouts, in Triton: PyTorch's take several times as long."""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

# Rows and columns of what a program transposes, and elements that it reorders.
BLOCK = 64
REORDER_BLOCK = 1024


@triton.jit
def transpose_kernel(
    in_ptr, out_ptr, channels, positions, sample: tl.int64, channel: tl.int64, BLOCK: tl.constexpr
):
    """Copy [samples, channels, positions], of these strides, to [samples, positions, channels]."""
    across, down = tl.cdiv(positions, BLOCK), tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    first_p, first_c = program % across * BLOCK, program // across % down * BLOCK
    at = (program // (across * down)).to(tl.int64)
    p, c = first_p + tl.arange(0, BLOCK), first_c + tl.arange(0, BLOCK)
    inside = (c < channels)[:, None] & (p < positions)[None, :]
    offsets = at * sample + c.to(tl.int64)[:, None] * channel + p[None, :]
    values = tl.load(in_ptr + offsets, mask=inside)
    offsets = (at * positions + p)[:, None] * channels + c[None, :]
    tl.store(out_ptr + offsets, values.T, mask=inside.T)


@triton.jit
def reorder_kernel(
    in_ptr, out_ptr, size, KERNEL: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy [samples, outer, KERNEL, INNER] to [samples, outer, INNER, KERNEL], row-major.

    A sample holds ``size`` elements. What is read here and there comes from the L1 cache.
    """
    blocks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    begin = (program // blocks).to(tl.int64) * size
    to = program % blocks * BLOCK + tl.arange(0, BLOCK)
    row, rest = to // (KERNEL * INNER), to % (KERNEL * INNER)
    source = row * (KERNEL * INNER) + rest % KERNEL * INNER + rest // KERNEL
    values = tl.load(in_ptr + begin + source, mask=to < size)
    tl.store(out_ptr + begin + to, values, mask=to < size)
