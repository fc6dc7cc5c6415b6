"""Reading tiles of operands [B, T, width], in Triton: by tensor descriptors or by pointers."""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashnorm_compile.kernels.device import Device


def allow_descriptors(device: Device) -> None:
    """Let kernels that the calling thread launches next make tensor descriptors.

    To be called before each launch: the backward has threads of its own.
    """
    if device.descriptors and not device.interpreted:
        triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Give Triton memory for the descriptors of a launch, on the current device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@triton.jit
def describe(
    ptr,
    shape,
    strides,
    ALONG: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return what `load` reads from: it knows where each sample ends, and the last one.

    ALONG and the strides are those of an `operands.Layout`; the stride of what lies side by side
    may be any. DESCRIPTORS says whether an operand of which something is promised is read by a
    tensor descriptor. If it is not, Triton must know that ``ptr`` is a multiple of 16: to say so of
    an argument of a function that is inlined, as this one, has no effect.
    """
    samples, tokens, width = shape
    sample_stride, token_stride, place_stride = strides
    if DESCRIPTORS and ALONG == "places":
        return tl.make_tensor_descriptor(
            ptr, [samples, tokens, width], [sample_stride, token_stride, 1], [1, BLOCK_T, BLOCK]
        )
    elif DESCRIPTORS and ALONG == "tokens":
        return tl.make_tensor_descriptor(
            ptr, [samples, width, tokens], [sample_stride, place_stride, 1], [1, BLOCK, BLOCK_T]
        )
    else:
        return ptr, shape, strides


@triton.jit
def load(
    operand,
    sample,
    token,
    place,
    ALONG: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return [BLOCK_T, BLOCK] of a sample from a token and a place on; 0 outside.

    By pointers, what lies side by side is read in pieces of 16 bytes: what follows the last must be
    0, if anything does.
    """
    if DESCRIPTORS and ALONG == "places":
        return operand.load([sample, token, place]).reshape(BLOCK_T, BLOCK)
    elif DESCRIPTORS and ALONG == "tokens":
        return operand.load([sample, place, token]).reshape(BLOCK, BLOCK_T).T
    else:
        ptr, shape, strides = operand
        samples, tokens, width = shape
        sample_stride, token_stride, place_stride = strides
        # All that is a multiple of 16 bytes is said to be: so much is read at once. A mask that may
        # end anywhere would make the compiler read single elements.
        vector: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        if ALONG != "any":
            sample_stride = sample_stride // vector * vector
        if ALONG == "places":
            token_stride, place_stride = token_stride // vector * vector, 1
            width = (width + vector - 1) // vector * vector
        if ALONG == "tokens":
            token_stride, place_stride = 1, place_stride // vector * vector
            tokens = (tokens + vector - 1) // vector * vector
        t = (token + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        i = (place + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        inside = (t < tokens) & (sample < samples) & (i < width)
        start = ptr + tl.cast(sample, tl.int64) * sample_stride
        return tl.load(start + t * token_stride + i * place_stride, mask=inside, other=0.0)
