"""From tensors to the kernel: how operands are read, which tiles, what runs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashnorm_compile.kernels.device import Device, find_device, float32_precision
from flashnorm_compile.kernels.division import cdiv
from flashnorm_compile.kernels.loading import allow_descriptors
from flashnorm_compile.kernels.operands import Operand, describe_operand
from flashnorm_compile.kernels.records import LENGTHS, encode_records, triton_dtype
from flashnorm_compile.kernels.weighted_gradient import tiling
from flashnorm_compile.kernels.weighted_gradient.kernel import weighted_gradients_kernel


@dataclass(frozen=True)
class Way:
    """What sites that are computed together have in common.

    Attributes:
        dtype: of the operands.
        left: how left is read, see `Layout.along`.
        right: how right is read.
        aligned: whether the result's rows are of whole 16 bytes.
        steps: of a sample's tokens.
        tile: what a program works on.
    """

    dtype: torch.dtype
    left: str
    right: str
    aligned: bool
    steps: int
    tile: tiling.Tile


Site = tuple[Operand, Operand]


def weighted_gradients(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], weights: Tensor
) -> list[Tensor]:
    """`op.weighted_gradients` for CUDA tensors. Does not synchronise with the host."""
    device = find_device(weights.device)
    weights = weights.contiguous()
    outs: list[Tensor | None] = []
    groups: dict[Way, list[tuple[int, Site]]] = {}
    for position, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        (samples, m, tokens), n = left.shape, right.shape[2]
        if 0 in (samples, m, tokens, n):
            outs.append(left.new_zeros((m, n), dtype=torch.float32))
            continue
        outs.append(None)
        site = describe_site(left, right, device)
        groups.setdefault(choose_way(*site, device), []).append((position, site))
    for way, members in groups.items():
        count = cdiv(len(members), LENGTHS[-1])
        size = cdiv(len(members), count)
        for first in range(0, len(members), size):
            positions, sites = zip(*members[first : first + size], strict=True)
            found = launch(sites, weights, way, device, None)
            for position, out in zip(positions, found, strict=True):
                outs[position] = out
    return outs  # type: ignore[return-value]


def describe_site(left: Tensor, right: Tensor, device: Device) -> Site:
    """Return how left [B, m, T] and right [B, T, n] are read."""
    first = describe_operand(left.mT, descriptors=device.hopper)
    return first, describe_operand(right, descriptors=device.hopper)


def choose_way(left: Operand, right: Operand, device: Device) -> Way:
    """Return how a site is computed. It does not depend on the number of samples."""
    (_, tokens, m), n = left.tensor.shape, right.tensor.shape[2]
    dtype, along = left.tensor.dtype, (left.layout.along, right.layout.along)
    tiles: tuple[tiling.Tile, ...]
    if dtype == torch.float32:
        tiles = tiling.TF32_TILES if float32_precision() == "tf32" else tiling.FLOAT32_TILES
    elif "any" in along or not device.hopper:
        tiles = tiling.OTHER_TILES
    elif along == ("tokens", "tokens"):
        tiles = tiling.SMALL_TILES
    else:
        tiles = tiling.LARGE_TILES + tiling.SMALL_TILES
    tile = tiling.choose_tile(m, n, tokens, tiles)
    return Way(dtype, *along, n % 4 == 0, cdiv(tokens, tile.tokens), tile)


def launch(
    sites: Sequence[Site], weights: Tensor, way: Way, device: Device, splits: int | None
) -> list[Tensor]:
    """Compute some sites together, none of them empty.

    Args:
        sites: at most as many as the longest of `LENGTHS`.
        weights: [B] float32.
        way: that of all sites.
        device: what they are on.
        splits: parts of all samples' tokens, at most one for each step; None to choose.
    """
    tile, samples = way.tile, weights.shape[0]
    sizes = [(left.tensor.shape[2], right.tensor.shape[2]) for left, right in sites]
    tiles = [cdiv(m, tile.m) * cdiv(n, tile.n) for m, n in sizes]
    programs = sum(tiles)
    if splits is None:
        splits = tiling.count_splits(programs, samples * way.steps, tile, device.processors)
    parts = [weights.new_empty((splits, m, n)) for m, n in sizes]
    records = []
    first = 0
    for (left, right), (m, n), part, count in zip(sites, sizes, parts, tiles, strict=True):
        addresses = left.tensor.data_ptr(), right.tensor.data_ptr(), part.data_ptr()
        strides = *left.layout.strides, *right.layout.strides
        records.append((first, *addresses, m, n, right.tensor.shape[1], *strides))
        first += count
    codes = encode_records(records, programs)
    with torch.cuda.device_of(weights):
        allow_descriptors(device)
        weighted_gradients_kernel[(programs, splits)](
            codes,
            weights,
            samples,
            splits,
            LENGTH=len(codes),
            DTYPE=triton_dtype(way.dtype),
            LEFT=way.left,
            RIGHT=way.right,
            DESCRIPTORS=device.hopper,
            ALIGNED=way.aligned,
            PRECISION=float32_precision(),
            UPCAST=device.interpreted,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_T=tile.tokens,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return [part.view(part.shape[1:]) if splits == 1 else part.sum(0) for part in parts]
