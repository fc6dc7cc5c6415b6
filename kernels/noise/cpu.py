"""The noise on the CPU: the reference's numbers bit by bit, in chunks that fit a cache.

The integer rounds run in NumPy, whose calls cost a third of PyTorch's on a small parameter; the
rest is shared with the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .reference import (
    BLOCK_HIGH_BITS,
    KEY_INCREMENTS,
    MULTIPLIERS,
    ROUNDS,
    WORD_MASK,
    box_muller,
    compute_dtype,
)

CHUNK_BLOCKS = 2**16

Words = npt.NDArray[np.uint64]

_WORD_BITS = np.uint64(32)
_WORD_MASK = np.uint64(WORD_MASK)
_MULTIPLIERS = np.array(MULTIPLIERS, dtype=np.uint64)[:, None]
_KEY_INCREMENTS = np.array(KEY_INCREMENTS, dtype=np.uint64)[:, None]


@dataclass(frozen=True)
class Span:
    """Some consecutive elements of one tensor; ``start`` is a multiple of 4."""

    tensor: int
    start: int
    numel: int

    @property
    def blocks(self) -> int:
        """How many blocks of 4 numbers it takes."""
        return (self.numel + 3) // 4


def add_noise(
    sums: Sequence[Tensor], key: Tensor, scalars: Tensor, first_stream: int, out_dtype: torch.dtype
) -> list[Tensor]:
    """`op.add_noise` for CPU tensors, of streams ``first_stream``, ``first_stream + 1``, ...

    Small tensors share the calls that make their noise.
    """
    flat_sums = [sum.contiguous().view(-1) for sum in sums]
    flat_outs = [torch.empty(sum.numel(), dtype=out_dtype) for sum in sums]
    seed, release = key.tolist()
    _, noise_scale, inv_expected_batch_size = scalars.tolist()

    for spans in _chunks([sum.numel() for sum in sums]):
        if noise_scale != 0.0:
            noise = normals(seed, release, first_stream, spans).mul_(noise_scale)
            parts = noise.split([4 * span.blocks for span in spans])
        for k, span in enumerate(spans):
            elements = slice(span.start, span.start + span.numel)
            noised = flat_sums[span.tensor][elements]
            noised = noised.to(compute_dtype(noised.dtype))
            if noise_scale != 0.0:
                noised = parts[k][: span.numel] + noised
            flat_outs[span.tensor][elements] = noised * inv_expected_batch_size

    return [out.view(sum.shape) for out, sum in zip(flat_outs, sums, strict=True)]


def _chunks(sizes: Sequence[int]) -> Iterator[list[Span]]:
    """Cut tensors into spans, and collect spans until they make a chunk."""
    chunk: list[Span] = []
    room = CHUNK_BLOCKS
    for tensor, size in enumerate(sizes):
        start = 0
        while start < size:
            span = Span(tensor, start, min(size - start, 4 * room))
            chunk.append(span)
            start += span.numel
            room -= span.blocks
            if room == 0:
                yield chunk
                chunk, room = [], CHUNK_BLOCKS
    if chunk:
        yield chunk


def normals(seed: int, release: int, first_stream: int, spans: Sequence[Span]) -> Tensor:
    """Return the noise of spans, float32 [4 · blocks], each filled up to whole blocks of 4."""
    block = np.concatenate(
        [np.arange(x.start // 4, x.start // 4 + x.blocks, dtype=np.uint64) for x in spans]
    )
    streams = np.array([first_stream + x.tensor for x in spans], dtype=np.uint64)
    stream = np.repeat(streams, [x.blocks for x in spans])
    even, odd = np.empty((2, 2, block.size), dtype=np.uint64)
    even[0] = block & _WORD_MASK
    odd[0] = (block >> _WORD_BITS) | (stream << np.uint64(BLOCK_HIGH_BITS))
    even[1] = release & WORD_MASK
    odd[1] = release >> 32 & WORD_MASK
    even, odd = _philox_4x32_inplace(even, odd, seed)

    words = (*even.view(np.int64), *odd.view(np.int64))
    x0, x2, x1, x3 = (torch.from_numpy(word) for word in words)
    normals = torch.empty(block.size, 4)
    normals[:, 0], normals[:, 1] = box_muller(x0, x1)
    normals[:, 2], normals[:, 3] = box_muller(x2, x3)
    return normals.view(-1)


def _philox_4x32_inplace(even: Words, odd: Words, seed: int) -> tuple[Words, Words]:
    """Run Philox4x32-10 in the storage of the counters.

    Between rounds the odd words keep the whole product: its high half is masked off after the
    exclusive or that consumes it, which saves a pass over memory.

    Args:
        even: [2, n], words 0 and 2 of the counters.
        odd: [2, n], words 1 and 3.
        seed: int64, the key.

    Returns:
        The even and the odd words of the result, [2, n] each.
    """
    key = np.array([[seed & WORD_MASK], [seed >> 32 & WORD_MASK]], dtype=np.uint64)
    spare = np.empty_like(even)
    for _ in range(ROUNDS):
        product = np.multiply(even, _MULTIPLIERS, out=spare)[::-1]
        np.right_shift(product, _WORD_BITS, out=even)
        np.bitwise_xor(even, odd, out=even)
        np.bitwise_xor(even, key, out=even)
        np.bitwise_and(even, _WORD_MASK, out=even)
        odd, spare = product, odd
        key = (key + _KEY_INCREMENTS) & _WORD_MASK
    return even, np.bitwise_and(odd, _WORD_MASK, out=spare)
