"""The noise on the CPU: the reference's numbers bit by bit, in chunks that fit a cache.

The integer rounds run in NumPy, whose calls cost a third of PyTorch's on a small parameter; the
rest is shared with the reference.
"""

from __future__ import annotations

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


def add_noise(
    sum: Tensor, key: Tensor, scalars: Tensor, stream: int, out_dtype: torch.dtype
) -> Tensor:
    """`op.add_noise` for CPU tensors."""
    flat_sum = sum.contiguous().view(-1)
    flat_out = torch.empty(sum.numel(), dtype=out_dtype)
    seed, release = key.tolist()
    _, noise_scale, inv_expected_batch_size = scalars.tolist()

    chunk_elements = 4 * CHUNK_BLOCKS
    for start in range(0, sum.numel(), chunk_elements):
        chunk = flat_sum[start : start + chunk_elements].to(compute_dtype(sum.dtype))
        if noise_scale == 0.0:
            noised = chunk
        else:
            noise = normal_chunk(seed, release, stream, start, chunk.numel())
            noised = noise.mul_(noise_scale) + chunk
        flat_out[start : start + chunk_elements] = noised * inv_expected_batch_size

    return flat_out.view(sum.shape)


def normal_chunk(seed: int, release: int, stream: int, start: int, numel: int) -> Tensor:
    """Return elements ``start .. start + numel - 1`` of a tensor's noise.

    Args:
        seed: int64.
        release: int64.
        stream: number of the tensor, in [0, 2**20).
        start: first element; a multiple of 4.
        numel: number of elements.

    Returns:
        float32 [numel].
    """
    block = np.arange(start // 4, (start + numel + 3) // 4, dtype=np.uint64)
    even, odd = np.empty((2, 2, block.size), dtype=np.uint64)
    even[0] = block & _WORD_MASK
    odd[0] = (block >> _WORD_BITS) | np.uint64(stream << BLOCK_HIGH_BITS)
    even[1] = release & WORD_MASK
    odd[1] = release >> 32 & WORD_MASK
    even, odd = _philox_4x32_inplace(even, odd, seed)

    words = (*even.view(np.int64), *odd.view(np.int64))
    x0, x2, x1, x3 = (torch.from_numpy(word) for word in words)
    normals = torch.empty(block.size, 4)
    normals[:, 0], normals[:, 1] = box_muller(x0, x1)
    normals[:, 2], normals[:, 3] = box_muller(x2, x3)
    return normals.view(-1)[:numel]


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
