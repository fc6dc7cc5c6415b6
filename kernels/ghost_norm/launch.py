"""From tensors to kernels: operands, scratch memory and arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm_compile.kernels.device import find_device
from flashnorm_compile.kernels.ghost_norm import kernel, planning, reference
from flashnorm_compile.kernels.loading import allow_descriptors


def ghost_norm(left: Tensor, right: Tensor, left_error: float, right_error: float) -> Tensor:
    """`op.ghost_norm` for CUDA tensors. Does not synchronise with the host."""
    if 0 in (*left.shape, right.shape[2]):
        return reference.ghost_norm(left, right, left_error, right_error).float()
    return _launch((left.mT, right), None, (1 + 2 * left_error, 1 + 2 * right_error))


def ghost_product(
    left: Tensor,
    right: Tensor,
    left2: Tensor,
    right2: Tensor,
    left_norms: Tensor,
    right_norms: Tensor,
    left2_norms: Tensor,
    right2_norms: Tensor,
) -> Tensor:
    """`op.ghost_product` for CUDA tensors. Does not synchronise with the host."""
    norms = (left_norms, right_norms, left2_norms, right2_norms)
    if 0 in (*left.shape, *right2.shape):
        return reference.ghost_product(left, right, left2, right2, *norms).float()
    rows = left.mT, right, left2.mT, right2
    return _launch(rows, tuple(x.contiguous() for x in norms), (0.0, 0.0))


def _launch(
    rows: tuple[Tensor, ...], norms: tuple[Tensor, ...] | None, factors: tuple[float, float]
) -> Tensor:
    """Start `kernel.sums_kernel` on rows [B, T, m] and [B, T, n], and [B, S, m] and [B, S, n].

    Without ``norms`` there are the first two operands only.
    """
    first = rows[0]
    device = find_device(first.device)
    lies = tuple((x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in rows)
    # Made once: a step has many layers of one shape.
    plan = planning.plan(lies, device)
    for operand, width in plan.copied:
        rows = *rows[:operand], _copy(rows[operand], width), *rows[operand + 1 :]
    (samples, tokens, m), (_, tokens2, n) = lies[0][0], lies[-1][0]
    if plan.given:
        rows = _products(rows[0]), rows[1]
    out = first.new_empty((3 if norms else 4, samples), dtype=torch.float32)
    scratch = first.new_empty(plan.scratch, dtype=torch.float32)
    counters = first.new_zeros(plan.counters, dtype=torch.int32)
    with torch.cuda.device_of(out):
        allow_descriptors(device)
        kernel.sums_kernel[(plan.programs,)](
            *(rows if norms else rows * 2),
            *(norms or (scratch,) * 4),
            out,
            scratch,
            counters,
            samples,
            tokens,
            tokens2,
            m,
            n,
            *plan.strides,
            *factors,
            plan.whole,
            plan.splits,
            LAYOUTS=plan.along,
            GIVEN=plan.given,
            SYMMETRIC=norms is None,
            ONE=plan.one,
            TMA=device.descriptors,
            UPCAST=device.interpreted,
            TILE=plan.tile.rows,
            BLOCK=plan.tile.width,
            num_warps=plan.tile.warps,
            num_stages=plan.tile.stages if device.hopper else min(plan.tile.stages, 3),
        )
    return out


def _copy(x: Tensor, width: int) -> Tensor:
    """Copy rows to where the kernel can read them, with zeros up to a multiple of 16 bytes."""
    samples, tokens, filled = x.shape
    copy = x.new_empty((samples, tokens, width))
    copy[..., :filled].copy_(x)
    copy[..., filled:].zero_()
    return copy


def _products(rows: Tensor) -> Tensor:
    """Multiply all rows of a sample by each other: [B, T, width] to float32 [B, T, T]."""
    if not rows.is_cuda:
        return rows.float() @ rows.float().mT
    return torch.bmm(rows, rows.mT, out_dtype=torch.float32)
