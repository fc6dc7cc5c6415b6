"""The specification of the noise, in plain PyTorch.

Element ``i`` (row-major) of the tensor with number ``stream``, in release number ``release``,
gets normal number ``i % 4`` of the Philox4x32-10 block with

    counter = (block[0:32], stream << 12 | block[32:44], release[0:32], release[32:64])
    key     = (seed[0:32], seed[32:64])                       where block = i // 4

and ``x[a:b]`` are the bits a..b-1 of x. For ``i < 2**46``, ``stream < 2**20`` and 64-bit
``release`` and ``seed`` the packing loses no bit, so no two elements, tensors or releases share a
counter. Reusing a (seed, release) pair repeats the noise: two gradients released under one pair
differ by their un-noised difference. The caller must never do that.

What is not claimed:
- Philox passes the statistical test batteries but is not a cryptographic cipher. The seed is a
  secret and has to come from the operating system's random source unless the run is a test.
- The samples are floating-point numbers. Both the sum and the noise are rounded, so the output is
  not a continuous Gaussian, and the proofs of differential privacy, which are about real numbers,
  do not cover the rounding (Mironov, "On significance of the least significant bits for
  differential privacy", CCS 2012; Holohan and Braghin, "Secure random sampling in differential
  privacy", ESORICS 2021). With 32-bit uniforms no normal exceeds 6.77 in absolute value; the true
  Gaussian does with probability 1.4e-11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORD_MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

BLOCK_HIGH_BITS = 12
MAX_STREAM = 2**20
MAX_ELEMENTS = 4 * 2 ** (32 + BLOCK_HIGH_BITS)


def philox_4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Encrypt counters with Philox4x32-10.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A
    product of two words may pass 2**63; int64 wraps around, and the masks below take the right
    bits of it all the same.

    Args:
        counter: int64 [..., 4], words in [0, 2**32).
        key: int64 [2], words in [0, 2**32).

    Returns:
        int64 [..., 4], words in [0, 2**32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(0)
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            high_word(product1) ^ c1 ^ k0,
            product1 & WORD_MASK,
            high_word(product0) ^ c3 ^ k1,
            product0 & WORD_MASK,
        )
        k0 = (k0 + KEY_INCREMENTS[0]) & WORD_MASK
        k1 = (k1 + KEY_INCREMENTS[1]) & WORD_MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def normal(seed: int | Tensor, release: int | Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """Return the N(0, 1) noise of one tensor in one release.

    Args:
        seed: secret of the run; int64, or a 0-d int64 tensor.
        release: number of the release; int64, or a 0-d int64 tensor.
        stream: number of the tensor, in [0, 2**20).
        shape: shape of the tensor.

    Returns:
        float32 [*shape], row-major, on the device of ``seed`` (the CPU if it is an int).
    """
    seed = torch.as_tensor(seed, dtype=torch.int64)
    release = torch.as_tensor(release, dtype=torch.int64)
    numel = math.prod(shape)
    block = torch.arange(-(-numel // 4), dtype=torch.int64, device=seed.device)
    counter = torch.stack(
        (
            block & WORD_MASK,
            (stream << BLOCK_HIGH_BITS) | (block >> 32),
            (release & WORD_MASK).expand_as(block),
            high_word(release).expand_as(block),
        ),
        dim=-1,
    )
    words = philox_4x32(counter, torch.stack((seed & WORD_MASK, high_word(seed))))
    x0, x1, x2, x3 = words.unbind(-1)
    normals = torch.stack((*box_muller(x0, x1), *box_muller(x2, x3)), dim=-1)
    return normals.flatten()[:numel].view(tuple(shape))


def add_noise(
    sum: Tensor, key: Tensor, scalars: Tensor, stream: int, out_dtype: torch.dtype
) -> Tensor:
    """Return ``((sum + noise_scale * z) * inv_expected_batch_size).to(out_dtype)``.

    Arguments and result as in `op.add_noise`. Runs on any device, without a synchronisation.
    """
    seed, release = key.unbind(0)
    _, noise_scale, inv_expected_batch_size = scalars.unbind(0)
    noise = normal(seed, release, stream, sum.shape) * noise_scale
    result = (noise + sum.to(compute_dtype(sum.dtype))) * inv_expected_batch_size
    return torch.empty(sum.shape, dtype=out_dtype, device=sum.device).copy_(result)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the sum of this dtype is noised: float32, or float64 for float64.

    The noise itself always has float32 precision.
    """
    return torch.promote_types(dtype, torch.float32)


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Turn two uniform words into two independent normals.

    Box and Muller, "A note on the generation of random normal deviates", 1958.

    Args:
        radius_word: int64, words in [0, 2**32).
        angle_word: int64 of the same shape, words in [0, 2**32).

    Returns:
        Two float32 tensors of the same shape.
    """
    radius = torch.sqrt(-2.0 * torch.log(uniform(radius_word)))
    angle = (2.0 * math.pi) * uniform(angle_word)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def uniform(word: Tensor) -> Tensor:
    """Map a word to (0, 1] in float32: at least 2**-33, so its logarithm is finite."""
    return word.to(torch.float32, memory_format=torch.contiguous_format) * 2.0**-32 + 2.0**-33


def high_word(value: Tensor) -> Tensor:
    """Return bits 32..63 of int64 values, as non-negative numbers."""
    return (value >> 32) & WORD_MASK
