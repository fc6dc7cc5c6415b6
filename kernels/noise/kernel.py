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
    seed, release = tl.load(key_ptr), tl.load(key_ptr + 1)

    noise = tl.zeros((4 * QUADS,), tl.float32)
    if noise_scale != 0.0:
        block = first + tl.arange(0, QUADS)
        z0, z1, z2, z3 = normals(block, seed, release, stream, BLOCK_HIGH_BITS)
        noise = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3)) * noise_scale

    element = first * 4 + tl.arange(0, 4 * QUADS)
    mask = element < numel
    value = tl.load(sum_ptr + element, mask=mask, other=0.0)
    value = value.to(tl.float64 if FLOAT64 else tl.float32)
    result = (value + noise) * inv_expected_batch_size
    tl.store(out_ptr + element, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def normals(block, seed, release, stream, BLOCK_HIGH_BITS: tl.constexpr):
    """Return the four normals of each Philox block. Arguments are int64; stream may be int32."""
    c0 = block.to(tl.uint32)
    c1 = ((block >> 32) | (stream.to(tl.int64) << BLOCK_HIGH_BITS)).to(tl.uint32)
    c2 = tl.zeros_like(c0) + release.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (release >> 32).to(tl.uint32)
    x0, x1, x2, x3 = _philox(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    z0, z1 = _box_muller(x0, x1)
    z2, z3 = _box_muller(x2, x3)
    return z0, z1, z2, z3


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Encrypt counters with Philox4x32-10, as `reference.philox_4x32`.

    `tl.philox` takes the halves of a product from two multiplications; here they come from one.
    """
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


# libdevice's cos and sin reduce angles of any size, by a table in local memory, and its log takes
# care of numbers that do not occur here. The polynomials below interpolate at Chebyshev points,
# solved for in 50 digits; the comments give function, interval and number of points. Of 20 million
# words, a radius was off by up to 1e-7 of itself and a cosine or sine by 3e-7; those of `reference`
# by 2e-7 and 6e-7.


@triton.jit
def _box_muller(radius_word, angle_word):
    """Turn two uint32 words into two float32 normals."""
    radius = tl.sqrt(-2.0 * _log(_uniform(radius_word)))
    cos, sin = _cos_sin(angle_word)
    return radius * cos, radius * sin


@triton.jit
def _log(x):
    """Return the logarithm of normal float32 numbers: exactly 0 for 1, and precise next to it."""
    # x = 2**k·(1 + f) with f in [-1/3, 1/3); the shift by the bits of 2/3 finds k.
    bits = x.to(tl.int32, bitcast=True)
    scale = (bits - 0x3F2AAAAB) & -0x800000  # k·2**23
    f = (bits - scale).to(tl.float32, bitcast=True) - 1.0
    # (ln(1 + f) - f)/f² on [-1/3, 1/3], 8 points.
    p = _polynomial(
        f,
        (
            -0.499999856, 0.333333202, -0.250041462, 0.200037803,
            -0.164830175, 0.141183099, -0.150407637, 0.13425749,
        ),
    )  # fmt: skip
    return scale.to(tl.float32) * 8.262958294867817e-08 + (p * (f * f) + f)  # ln(2)/2**23


@triton.jit
def _cos_sin(word):
    """Return cosine and sine of 2π·(word + 1/2)/2**32.

    With half the angle, h = π·t for t in [-1/2, 1/2], no quadrant has to be found: of
    c = √2·cos(h) and s = √2·sin(h), cos(2h) = c² - 1 and sin(2h) = c·s.
    """
    # A signed word is the same angle, nearer to 0.
    t = word.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    t += 1.1641532182693481e-10
    x = t * t
    # √2·cos(π√x) on [0, 1/4], 6 points.
    c = _polynomial(
        x,
        (
            1.41421356, -6.97886411, 5.73988153, -1.88827485,
            0.332251189, -0.034501058,
        ),
    )  # fmt: skip
    # √2·sin(π√x)/√x on [0, 1/4], 5 points.
    s = _polynomial(
        x,
        (
            4.44288292, -7.30824568, 3.60635403, -0.846110414,
            0.109822044,
        ),
    )  # fmt: skip
    s *= t
    return c * c - 1.0, c * s


@triton.jit
def _polynomial(x, coefficients):
    """Return Σ_i coefficients[i]·xⁱ by Horner's rule: one multiply-add for each."""
    value = tl.zeros_like(x) + coefficients[len(coefficients) - 1]
    for i in tl.static_range(2, len(coefficients) + 1):
        value = value * x + coefficients[len(coefficients) - i]
    return value


@triton.jit
def _uniform(word):
    """Map a uint32 word to (0, 1] in float32; 2.3283064365386963e-10 is 2**-32."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
