"""The custom ops for clipped gradients of linear layers: of several, and of one."""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm_compile.kernels.weighted_gradient import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Elements of operands that are weighted at once where there is no kernel.
CHUNK_ELEMENTS = 2**24


@torch.library.custom_op("flashnorm::weighted_gradients", mutates_args=())
def weighted_gradients(lefts: list[Tensor], rights: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Return Σ_b weights[b]·(lefts[k]_b @ rights[k]_b) for every layer k.

    Samples of weight 0 are left out, whatever they hold. On a GPU no operand is copied, and
    weights meet sums of products in float32: of 16-bit operands the products are exact, a weight is
    applied to within 2**-21 of itself, and the sum over samples so far is rounded once more where
    a sample ends. Products of float32 numbers are float32's own, or TF32's where
    ``torch.backends.cuda.matmul.fp32_precision`` (which ``torch.set_float32_matmul_precision``
    sets) says so at the time of the call. Results repeat bit by bit.

    Layers of one call share a launch, if their T is about the same: it fills a GPU to the last
    where one layer does not, and spares the host. All results are there at once.

    Args:
        lefts: [B, m, T] each, bfloat16, float16, float32 or float64; any strides.
        rights: [B, T, n] each, of the dtype of its left; any strides. Fast where each operand has
            a dim of stride 1, and addresses and other strides are multiples of 16 bytes; not made
            for T below 16.
        weights: float32 [B], finite. A GPU keeps the sum in units of each weight in turn:
            Σ_j |w_j||left_j @ right_j| / |w_b| must not overflow float32 for any b with w_b ≠ 0.
            It does not for clipping factors C/‖g_b‖ of norms whose square is a float32.

    Returns:
        New row-major tensors [m, n], float32; float64 of float64 operands.

    Raises:
        ValueError: an argument has the wrong dtype or shape, or they do not fit each other.
    """
    _validate(lefts, rights, weights)
    return [
        reference.weighted_gradient(left, right, weights)
        for left, right in zip(lefts, rights, strict=True)
    ]


@weighted_gradients.register_fake
def _(lefts: list[Tensor], rights: list[Tensor], weights: Tensor) -> list[Tensor]:
    _validate(lefts, rights, weights)
    return [_empty(left, right) for left, right in zip(lefts, rights, strict=True)]


@weighted_gradients.register_kernel("cpu")
def _(lefts: list[Tensor], rights: list[Tensor], weights: Tensor) -> list[Tensor]:
    _validate(lefts, rights, weights)
    return [
        _by_chunks(left, right, weights) for left, right in zip(lefts, rights, strict=True)
    ]


@weighted_gradients.register_kernel("cuda")
def _(lefts: list[Tensor], rights: list[Tensor], weights: Tensor) -> list[Tensor]:
    _validate(lefts, rights, weights)
    if any(left.dtype == torch.float64 for left in lefts):
        return [
            _by_chunks(left, right, weights)
            if left.dtype == torch.float64
            else weighted_gradient(left, right, weights)
            for left, right in zip(lefts, rights, strict=True)
        ]
    # Imported here: the package must import where Triton is not installed.
    from flashnorm_compile.kernels.weighted_gradient import launch

    return launch.weighted_gradients(lefts, rights, weights)


@torch.library.custom_op("flashnorm::weighted_gradient", mutates_args=())
def weighted_gradient(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_b weights[b]·(left_b @ right_b): `weighted_gradients` of one layer."""
    return weighted_gradients([left], [right], weights)[0]


@weighted_gradient.register_fake
def _(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    _validate([left], [right], weights)
    return _empty(left, right)


def _empty(left: Tensor, right: Tensor) -> Tensor:
    dtype = reference.result_dtype(left)
    return left.new_empty((left.shape[1], right.shape[2]), dtype=dtype)


def _by_chunks(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """Weight a copy of some samples' operands at a time, and add up their products."""
    (samples, m, tokens), n = left.shape, right.shape[2]
    dtype = reference.result_dtype(left)
    total = left.new_zeros((m, n), dtype=dtype)
    zero = torch.zeros((), dtype=dtype, device=left.device)
    step = max(1, CHUNK_ELEMENTS // max(1, tokens * (m + n)))
    for first in range(0, samples, step):
        some = slice(first, first + step)
        weight = weights[some].to(dtype).view(-1, 1, 1)
        x = torch.where(weight == 0, zero, left[some].to(dtype) * weight)
        y = torch.where(weight == 0, zero, right[some].to(dtype))
        rows = x.shape[0] * tokens
        total.addmm_(x.transpose(0, 1).reshape(m, rows), y.reshape(rows, n))
    return total


def _validate(lefts: list[Tensor], rights: list[Tensor], weights: Tensor) -> None:
    if len(lefts) != len(rights):
        raise ValueError(
            f"weighted_gradients: {len(lefts)} lefts and {len(rights)} rights; expected pairs"
        )
    if weights.dtype != torch.float32 or weights.dim() != 1:
        raise ValueError(
            f"weighted_gradients: weights is {weights.dtype} {list(weights.shape)}; "
            "expected torch.float32 [B]"
        )
    for k, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        _validate_pair(k, left, right, weights)


def _validate_pair(k: int, left: Tensor, right: Tensor, weights: Tensor) -> None:
    for name, tensor, shape in (("lefts", left, "[B, m, T]"), ("rights", right, "[B, T, n]")):
        if tensor.dim() != 3 or tensor.dtype not in DTYPES:
            raise ValueError(
                f"weighted_gradients: {name}[{k}] is {tensor.dtype}, {tensor.dim()}-d; "
                f"expected {shape} of bfloat16, float16, float32 or float64"
            )
        if tensor.device != weights.device:
            raise ValueError(
                f"weighted_gradients: {name}[{k}] is on {tensor.device} and weights on "
                f"{weights.device}; expected one device"
            )
    if left.dtype != right.dtype:
        raise ValueError(
            f"weighted_gradients: lefts[{k}] is {left.dtype} and rights[{k}] {right.dtype}; "
            "expected one dtype"
        )
    for what, name, sizes in (
        ("samples", f"rights[{k}]", (left.shape[0], right.shape[0])),
        ("samples", "weights", (left.shape[0], weights.shape[0])),
        ("tokens", f"rights[{k}]", (left.shape[2], right.shape[1])),
    ):
        # Only sizes that are known: a comparison of symbolic ones would fix them.
        if all(isinstance(size, int) for size in sizes) and sizes[0] != sizes[1]:
            raise ValueError(
                f"weighted_gradients: lefts[{k}] holds {sizes[0]} {what} and {name} {sizes[1]}; "
                "expected [B, m, T], [B, T, n] and weights [B]"
            )
