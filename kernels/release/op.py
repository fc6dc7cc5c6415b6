"""The custom op ``flashnorm::release``: from per-sample gradients to what leaves the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm_compile.kernels.noise import cpu as noise_cpu
from flashnorm_compile.kernels.noise.reference import MAX_STREAM
from flashnorm_compile.kernels.release import reference


@torch.library.custom_op("flashnorm::release", mutates_args=())
def release(
    samples: list[Tensor],
    weights: Tensor,
    key: Tensor,
    scalars: Tensor,
    first_stream: int,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """Return, for each gradient k, the noisy weighted sum over samples, scaled.

        ((Σ_b weights[b]·samples[k][b] + noise_scale·z_k) · inv_expected_batch_size).to(out_dtype)

    with z_k the noise of stream ``first_stream + k`` (see ``kernels.noise.reference``). Computed
    in float32 (float64 for float64 samples). Samples of weight 0 are left out, whatever they hold.
    All gradients go through one call, which saves the cost of a call for each.

    Args:
        samples: per-sample gradients [B, ...], floating; any strides.
        weights: float32 [B].
        key: int64 [2]: seed, release index. A pair must not be used for two releases.
        scalars: float32 [3]: clipping norm C (not used here), noise scale σC, 1 / expected batch
            size.
        first_stream: stream of the first gradient; the streams must be unique in a release.
        out_dtype: dtype of the results.

    Returns:
        New row-major tensors [...], one per gradient.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range.
    """
    _validate(samples, weights, key, scalars, first_stream)
    return [
        reference.release(x, weights, key, scalars, first_stream + k, out_dtype)
        for k, x in enumerate(samples)
    ]


@release.register_fake
def _(
    samples: list[Tensor],
    weights: Tensor,
    key: Tensor,
    scalars: Tensor,
    first_stream: int,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    _validate(samples, weights, key, scalars, first_stream)
    return [torch.empty(x.shape[1:], dtype=out_dtype, device=x.device) for x in samples]


@release.register_kernel("cpu")
def _(
    samples: list[Tensor],
    weights: Tensor,
    key: Tensor,
    scalars: Tensor,
    first_stream: int,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    _validate(samples, weights, key, scalars, first_stream)
    sums = [reference.weighted_sum(x, weights) for x in samples]
    return noise_cpu.add_noise(sums, key, scalars, first_stream, out_dtype)


@release.register_kernel("cuda")
def _(
    samples: list[Tensor],
    weights: Tensor,
    key: Tensor,
    scalars: Tensor,
    first_stream: int,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    # Imported here: the package must import where Triton is not installed.
    from flashnorm_compile.kernels.release import launch

    _validate(samples, weights, key, scalars, first_stream)
    return launch.release(samples, weights, key, scalars, first_stream, out_dtype)


def _validate(
    samples: list[Tensor], weights: Tensor, key: Tensor, scalars: Tensor, first_stream: int
) -> None:
    for name, tensor, dtype, shape in (
        ("weights", weights, torch.float32, None),
        ("key", key, torch.int64, 2),
        ("scalars", scalars, torch.float32, 3),
    ):
        wrong_size = shape is not None and (tensor.dim() != 1 or tensor.shape[0] != shape)
        if tensor.dtype != dtype or tensor.dim() != 1 or wrong_size:
            raise ValueError(
                f"release: {name} is {tensor.dtype} {list(tensor.shape)}; "
                f"expected {dtype} [{'B' if shape is None else shape}]"
            )
    if not 0 <= first_stream <= MAX_STREAM - len(samples):
        raise ValueError(
            f"release: {len(samples)} streams from {first_stream}; expected 0 <= stream < 2**20"
        )
    for k, x in enumerate(samples):
        if not x.dtype.is_floating_point or x.dim() == 0:
            raise ValueError(f"release: samples[{k}] is {x.dtype}, {x.dim()}-d; expected [B, ...]")
        sizes = (x.shape[0], weights.shape[0])
        # Only sizes that are known: a comparison of symbolic ones would fix them.
        if all(isinstance(size, int) for size in sizes) and sizes[0] != sizes[1]:
            raise ValueError(
                f"release: samples[{k}] holds {sizes[0]} samples; expected {sizes[1]}, one per "
                "weight"
            )
        if x.device != weights.device:
            raise ValueError(
                f"release: samples[{k}] is on {x.device} and weights on {weights.device}; "
                "expected one device"
            )
