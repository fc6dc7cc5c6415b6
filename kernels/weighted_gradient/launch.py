"""From tensors to the kernel: how operands are read, which tiles, what runs together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashnorm_compile.kernels.release.kernel import _code, _triton_dtype
from flashnorm_compile.kernels.weighted_gradient import tiling
from flashnorm_compile.kernels.weighted_gradient.kernel import weighted_gradients_kernel

# Sites of one launch: what runs together is cut into parts no longer than the longest of these,
# and a part is padded to the next, so that few variants are compiled. 32 records take 3.3 of the
# 4 KiB a launch may pass.
CHUNK_LENGTHS = (1, 8, 32)

# A stride that serves a tensor descriptor where there is nothing to stride over.
_ANY_STRIDE = 16


@dataclass(frozen=True)
class Device:
    """What the choice of tiles depends on."""

    processors: int
    descriptors: bool


@dataclass(frozen=True)
class Operand:
    """A tensor [B, T, width], and how it is read.

    Attributes:
        tensor: the tensor.
        mode: "places" or "tokens", by which lie side by side, in rows of whole 16 bytes; or "any".
        strides: of samples, tokens and places.
    """

    tensor: Tensor
    mode: str
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Way:
    """What sites that are computed together have in common.

    Attributes:
        dtype: of the operands.
        left: how left is read, see `Operand.mode`.
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
    device = _device(weights.device)
    weights = weights.contiguous()
    outs: list[Tensor | None] = []
    groups: dict[Way, list[tuple[int, Site]]] = {}
    for position, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        (samples, m, tokens), n = left.shape, right.shape[2]
        if 0 in (samples, m, tokens, n):
            outs.append(left.new_zeros((m, n), dtype=torch.float32))
            continue
        outs.append(None)
        site = operand(left.mT, device), operand(right, device)
        groups.setdefault(choose_way(*site, device), []).append((position, site))
    for way, members in groups.items():
        count = tiling.cdiv(len(members), CHUNK_LENGTHS[-1])
        size = tiling.cdiv(len(members), count)
        for first in range(0, len(members), size):
            positions, sites = zip(*members[first : first + size], strict=True)
            found = launch(sites, weights, way, device, None)
            for position, out in zip(positions, found, strict=True):
                outs[position] = out
    return outs  # type: ignore[return-value]


def operand(x: Tensor, device: Device) -> Operand:
    """Return how [B, T, width] is read.

    A tensor descriptor takes a last stride of 1, and an address and other strides of whole 16
    bytes. The stride of a dim of size 1 says nothing.
    """
    names = ("places", 2), ("tokens", 1)
    for mode, inner in names if x.data_ptr() % 16 == 0 else ():
        strides = [
            stride if size > 1 else _ANY_STRIDE
            for size, stride in zip(x.shape, x.stride(), strict=True)
        ]
        side_by_side = x.stride(inner) == 1 or x.shape[inner] == 1
        strides[inner] = 1
        lengths = [strides[0], strides[3 - inner]]
        if not device.descriptors:
            lengths.append(x.shape[inner])
        if side_by_side and all(
            length > 0 and length * x.element_size() % 16 == 0 for length in lengths
        ):
            return Operand(x, mode, tuple(strides))
    return Operand(x, "any", x.stride())


def choose_way(left: Operand, right: Operand, device: Device) -> Way:
    """Return how a site is computed. It does not depend on the number of samples."""
    (_, tokens, m), n = left.tensor.shape, right.tensor.shape[2]
    dtype, modes = left.tensor.dtype, (left.mode, right.mode)
    tiles: tuple[tiling.Tile, ...]
    if dtype == torch.float32:
        tiles = tiling.TF32_TILES if _precision() == "tf32" else tiling.FLOAT32_TILES
    elif "any" in modes or not device.descriptors:
        tiles = tiling.OTHER_TILES
    elif modes == ("tokens", "tokens"):
        tiles = tiling.SMALL_TILES
    else:
        tiles = tiling.LARGE_TILES + tiling.SMALL_TILES
    tile = tiling.choose_tile(m, n, tokens, tiles)
    return Way(dtype, *modes, n % 4 == 0, tiling.cdiv(tokens, tile.tokens), tile)


def launch(
    sites: Sequence[Site], weights: Tensor, way: Way, device: Device, splits: int | None
) -> list[Tensor]:
    """Compute some sites together, none of them empty.

    Args:
        sites: at most as many as the longest chunk.
        weights: [B] float32.
        way: that of all sites.
        device: what they are on.
        splits: parts of all samples' tokens, at most one for each step; None to choose.
    """
    tile, samples = way.tile, weights.shape[0]
    sizes = [(left.tensor.shape[2], right.tensor.shape[2]) for left, right in sites]
    tiles = [tiling.cdiv(m, tile.m) * tiling.cdiv(n, tile.n) for m, n in sizes]
    programs = sum(tiles)
    if splits is None:
        splits = tiling.count_splits(programs, samples * way.steps, tile, device.processors)
    parts = [weights.new_empty((splits, m, n)) for m, n in sizes]
    records = []
    first = 0
    for (left, right), (m, n), part, count in zip(sites, sizes, parts, tiles, strict=True):
        addresses = left.tensor.data_ptr(), right.tensor.data_ptr(), part.data_ptr()
        fields = (first, *addresses, m, n, right.tensor.shape[1], *left.strides, *right.strides)
        records.append(tuple(map(_code, fields)))
        first += count
    length = next(length for length in CHUNK_LENGTHS if length >= len(records))
    # No program is left for what pads the chunk.
    records += [(_code(programs), *records[-1][1:])] * (length - len(records))
    interpreted = not weights.is_cuda
    with torch.cuda.device_of(weights):
        # For the descriptors. It is the thread's own setting, so it is made in every call.
        triton.set_allocator(functools.partial(_allocate, weights.device))
        weighted_gradients_kernel[(programs, splits)](
            tuple(records),
            weights,
            samples,
            splits,
            LENGTH=length,
            DTYPE=_triton_dtype(way.dtype),
            LEFT=way.left,
            RIGHT=way.right,
            DESCRIPTORS=device.descriptors,
            ALIGNED=way.aligned,
            PRECISION=_precision(),
            UPCAST=interpreted,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_T=tile.tokens,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return [part.view(part.shape[1:]) if splits == 1 else part.sum(0) for part in parts]


def _precision() -> str:
    """Of float32 products; "none" is what PyTorch calls its default, which is float32's own."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.lru_cache
def _device(device: torch.device) -> Device:
    """Look up the GPU; a CPU, where the interpreter runs, stands in for a small one."""
    if device.type == "cpu":
        return Device(processors=4, descriptors=True)
    properties = torch.cuda.get_device_properties(device)
    # Hopper and large Blackwells have the copy engine, and shared memory for large tiles.
    return Device(properties.multi_processor_count, properties.major in (9, 10))


def _allocate(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    """Give a kernel memory; its address is a multiple of 512."""
    return torch.empty(size, dtype=torch.int8, device=device)
