"""From tensors to the kernel: how operands are read, which tiles, how many parts."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashnorm_compile.kernels.weighted_gradient import tiling
from flashnorm_compile.kernels.weighted_gradient.kernel import weighted_gradient_kernel

# Rows of tiles that run together: with 128 x 256 those of an H100 then make a square of the result.
GROUP = 16

# A stride that serves a tensor descriptor where there is nothing to stride over.
_ANY_STRIDE = 16


@dataclass(frozen=True)
class Device:
    """What the choice of tiles depends on."""

    processors: int
    hopper: bool


@dataclass(frozen=True)
class Layout:
    """How [B, T, width] is read.

    Attributes:
        mode: "places" or "tokens", by which lie side by side, through a tensor descriptor; or
            "pointers".
        strides: of samples, tokens and places.
    """

    mode: str
    strides: tuple[int, ...]


def weighted_gradient(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """`op.weighted_gradient` for CUDA tensors. Does not synchronise with the host."""
    (samples, m, tokens), n = left.shape, right.shape[2]
    if 0 in (samples, m, tokens, n):
        return left.new_zeros((m, n), dtype=torch.float32)
    device = _device(left.device)
    layouts = layout(left.mT, device.hopper), layout(right, device.hopper)
    tile = tiling.choose_tile(m, n, tokens, _tiles(left.dtype, layouts))
    splits = tiling.count_splits(m, n, tokens, samples, tile, device.processors)
    return run(left, right, weights, layouts, tile, splits)


def run(
    left: Tensor,
    right: Tensor,
    weights: Tensor,
    layouts: tuple[Layout, Layout],
    tile: tiling.Tile,
    splits: int,
) -> Tensor:
    """Compute `weighted_gradient` in a given way; nothing is empty.

    Args:
        left: [B, m, T].
        right: [B, T, n].
        weights: [B] float32.
        layouts: of left, as [B, T, m], and right.
        tile: what a program works on.
        splits: parts of all samples' tokens, at most one for each step of ``tile.tokens``.
    """
    (samples, m, tokens), n = left.shape, right.shape[2]
    parts = left.new_empty((splits, m, n), dtype=torch.float32)
    grid = (tiling.cdiv(m, tile.m) * tiling.cdiv(n, tile.n), splits)
    with torch.cuda.device_of(left):
        # For the descriptors. It is the thread's own setting, so it is made in every call.
        triton.set_allocator(functools.partial(_allocate, left.device))
        weighted_gradient_kernel[grid](
            left,
            right,
            weights.contiguous(),
            parts,
            samples,
            tokens,
            m,
            n,
            *layouts[0].strides,
            *layouts[1].strides,
            splits,
            LEFT=layouts[0].mode,
            RIGHT=layouts[1].mode,
            PRECISION=_precision(),
            UPCAST=not left.is_cuda,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_T=tile.tokens,
            GROUP=GROUP,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return parts.view(m, n) if splits == 1 else parts.sum(0)


def layout(x: Tensor, descriptors: bool) -> Layout:
    """Return how [B, T, width] is read, through a tensor descriptor if that is possible.

    A descriptor takes a last stride of 1, and an address and other strides of whole 16 bytes. The
    stride of a dim of size 1 says nothing.
    """
    names = ("places", 2), ("tokens", 1)
    for mode, inner in names if descriptors and x.data_ptr() % 16 == 0 else ():
        strides = [
            stride if size > 1 else _ANY_STRIDE
            for size, stride in zip(x.shape, x.stride(), strict=True)
        ]
        side_by_side = x.stride(inner) == 1 or x.shape[inner] == 1
        strides[inner] = 1
        others = (strides[0], strides[3 - inner])
        if side_by_side and all(
            stride > 0 and stride * x.element_size() % 16 == 0 for stride in others
        ):
            return Layout(mode, tuple(strides))
    return Layout("pointers", x.stride())


def _tiles(dtype: torch.dtype, layouts: tuple[Layout, Layout]) -> tuple[tiling.Tile, ...]:
    if dtype == torch.float32:
        return tiling.TF32_TILES if _precision() == "tf32" else tiling.FLOAT32_TILES
    pointers = "pointers" in (layouts[0].mode, layouts[1].mode)
    return tiling.OTHER_TILES if pointers else tiling.HOPPER_TILES


def _precision() -> str:
    """Of float32 products; "none" is what PyTorch calls its default, which is float32's own."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.lru_cache
def _device(device: torch.device) -> Device:
    """Look up the GPU; a CPU, where the interpreter runs, stands in for a small one."""
    if device.type == "cpu":
        return Device(processors=4, hopper=True)
    properties = torch.cuda.get_device_properties(device)
    # What follows Hopper has its copy engine and shared memory, but for small GPUs (12.x).
    return Device(properties.multi_processor_count, properties.major in (9, 10))


def _allocate(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    """Give a kernel memory; its address is a multiple of 512."""
    return torch.empty(size, dtype=torch.int8, device=device)
