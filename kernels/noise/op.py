"""The custom op ``flashnorm::add_noise``: the last step before a gradient is released."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, reference


@torch.library.custom_op("flashnorm::add_noise", mutates_args=())
def add_noise(
    sum: Tensor, key: Tensor, scalars: Tensor, stream: int, out_dtype: torch.dtype
) -> Tensor:
    """Return ``((sum + noise_scale * z) * inv_expected_batch_size).to(out_dtype)``.

    ``z ~ N(0, I)`` is a function of (seed, release index, stream, row-major element index) alone:
    `reference` specifies it and says what is not claimed. Neither the strides of ``sum`` nor the
    device change it, except for rounding in the last bits. Computed in float32, also for a
    bfloat16 ``sum`` (in float64 for a float64 ``sum``; ``z`` keeps float32 precision). No random
    numbers are made when ``noise_scale`` is 0.

    Args:
        sum: [...], floating; the sum of clipped per-sample gradients. Any strides.
        key: int64 [2], on the device of ``sum``: seed, release index. A pair must not be used for
            two releases.
        scalars: float32 [3], on the device of ``sum``: clipping norm C (not used here), noise
            scale σC, 1 / expected batch size.
        stream: number of the tensor, in [0, 2**20); unique among the tensors of one release.
        out_dtype: dtype of the result.

    Returns:
        A new row-major tensor [...], whatever the strides of ``sum``.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range.
    """
    _validate(sum, key, scalars, stream, out_dtype)
    return reference.add_noise(sum, key, scalars, stream, out_dtype)


@add_noise.register_fake
def _(sum: Tensor, key: Tensor, scalars: Tensor, stream: int, out_dtype: torch.dtype) -> Tensor:
    _validate(sum, key, scalars, stream, out_dtype)
    return torch.empty(sum.shape, dtype=out_dtype, device=sum.device)


@add_noise.register_kernel("cpu")
def _(sum: Tensor, key: Tensor, scalars: Tensor, stream: int, out_dtype: torch.dtype) -> Tensor:
    _validate(sum, key, scalars, stream, out_dtype)
    return cpu.add_noise([sum], key, scalars, stream, out_dtype)[0]


@add_noise.register_kernel("cuda")
def _(sum: Tensor, key: Tensor, scalars: Tensor, stream: int, out_dtype: torch.dtype) -> Tensor:
    # Imported here: the package must import where Triton is not installed.
    from . import kernel

    _validate(sum, key, scalars, stream, out_dtype)
    return kernel.add_noise(sum, key, scalars, stream, out_dtype)


def _validate(
    sum: Tensor, key: Tensor, scalars: Tensor, stream: int, out_dtype: torch.dtype
) -> None:
    """Raise ValueError unless the arguments are what `add_noise` documents."""
    for name, dtype in (("sum.dtype", sum.dtype), ("out_dtype", out_dtype)):
        if not dtype.is_floating_point:
            raise ValueError(f"add_noise: {name} is {dtype}; expected a real floating dtype")
    for name, tensor, dtype, size in (
        ("key", key, torch.int64, 2),
        ("scalars", scalars, torch.float32, 3),
    ):
        if tensor.dtype != dtype or tensor.dim() != 1 or tensor.shape[0] != size:
            raise ValueError(
                f"add_noise: {name} is {tensor.dtype} {list(tensor.shape)}; "
                f"expected {dtype} [{size}]"
            )
        if tensor.device != sum.device:
            raise ValueError(
                f"add_noise: {name} is on {tensor.device} and sum on {sum.device}; "
                "expected one device"
            )
    if not 0 <= stream < reference.MAX_STREAM:
        raise ValueError(f"add_noise: stream is {stream}; expected 0 <= stream < 2**20")
