"""From tensors to kernels: operands, scratch memory and arguments."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashnorm_compile.kernels.device import Device, find_device
from flashnorm_compile.kernels.division import cdiv
from flashnorm_compile.kernels.ghost_norm import kernel, planning, reference
from flashnorm_compile.kernels.loading import allow_descriptors
from flashnorm_compile.kernels.records import encode_records, triton_dtype

# Sites of one launch: one site alone leaves multiprocessors idle at the end. A program looks up a
# site for each tile, and of more sites that takes longer than it saves.
SITES_PER_LAUNCH = 8


@dataclass(frozen=True)
class _Site:
    """A site that is launched.

    Attributes:
        reading: how its operands are read.
        rows: these: [B, T, m] and [B, T, n], and of an inner product [B, S, m] and [B, S, n].
        factors: of squares of norms of left's and of right's rows.
        position: among all sites, where its sums go.
    """

    reading: planning.Reading
    rows: tuple[Tensor, ...]
    factors: tuple[float, float]
    position: int


def ghost_norms(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    left_errors: Sequence[float],
    right_errors: Sequence[float],
) -> Tensor:
    """`op.ghost_norms` for CUDA tensors. Does not synchronise with the host."""
    device, samples = find_device(lefts[0].device), lefts[0].shape[0]
    out = lefts[0].new_empty((4, len(lefts), samples), dtype=torch.float32)
    ways: dict[planning.Way, list[_Site]] = {}
    for position, (left, right, *errors) in enumerate(
        zip(lefts, rights, left_errors, right_errors, strict=True)
    ):
        if 0 in (*left.shape, right.shape[2]):
            out[:, position] = reference.ghost_norm(left, right, *errors)
            continue
        factors = 1 + 2 * errors[0], 1 + 2 * errors[1]
        site = _read((left.mT, right), factors, position, device)
        ways.setdefault(site.reading.way, []).append(site)
    with torch.cuda.device_of(out):
        for sites in ways.values():
            # Sites that take equally long come together.
            sites.sort(key=lambda site: -sum(site.reading.widths))
            size = cdiv(len(sites), cdiv(len(sites), SITES_PER_LAUNCH))
            for first in range(0, len(sites), size):
                _launch(sites[first : first + size], None, out, device)
    return out


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
    device = find_device(left.device)
    site = _read((left.mT, right, left2.mT, right2), (0.0, 0.0), 0, device)
    out = left.new_empty((3, left.shape[0]), dtype=torch.float32)
    with torch.cuda.device_of(out):
        _launch([site], tuple(x.contiguous() for x in norms), out, device)
    return out


def _read(
    rows: tuple[Tensor, ...], factors: tuple[float, float], position: int, device: Device
) -> _Site:
    """Find how operands are read; copy and multiply what must be."""
    lies = tuple((x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in rows)
    reading = planning.read(lies, rows[0].dtype, device)
    for operand, width in reading.copied:
        rows = *rows[:operand], _copy(rows[operand], width), *rows[operand + 1 :]
    if reading.way.given:
        rows = _products(rows[0]), rows[1]
    return _Site(reading, rows, factors, position)


def _launch(
    sites: Sequence[_Site], norms: tuple[Tensor, ...] | None, out: Tensor, device: Device
) -> None:
    """Start `kernel.sums_kernel`, which describes the arguments, for sites of one way."""
    way, samples = sites[0].reading.way, out.shape[-1]
    width = min(sum(site.reading.widths) for site in sites)
    plan = planning.plan(way, samples, len(sites), width, device)
    records = encode_records([_record(k, site) for k, site in enumerate(sites)], len(sites))
    scratch = out.new_empty(plan.scratch)
    counters = out.new_zeros(plan.counters, dtype=torch.int32)
    allow_descriptors(device)
    kernel.sums_kernel[(plan.programs,)](
        records,
        *(norms or (scratch,) * 4),
        out,
        scratch,
        counters,
        len(sites),
        samples,
        way.tokens,
        way.tokens2,
        out[0].numel(),
        plan.whole,
        plan.splits,
        LENGTH=len(records),
        DTYPE=triton_dtype(way.dtype),
        LAYOUTS=way.along,
        GIVEN=way.given,
        SYMMETRIC=way.symmetric,
        ONE=plan.one,
        TMA=device.descriptors,
        UPCAST=device.interpreted,
        TILE=way.tile.rows,
        BLOCK=way.tile.width,
        num_warps=way.tile.warps,
        num_stages=way.tile.stages if device.hopper else min(way.tile.stages, 3),
    )


def _record(position: int, site: _Site) -> tuple[int, ...]:
    addresses = [x.data_ptr() for x in site.rows]
    if len(addresses) == 2:
        addresses *= 2
    bits = struct.unpack("2i", struct.pack("2f", *site.factors))
    reading = site.reading
    return (position, site.position, *addresses, *reading.widths, *reading.strides, *bits)


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
