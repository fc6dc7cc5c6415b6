"""From tensors to kernels: layouts, tiles and scratch memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashnorm_compile.kernels.ghost_norm import kernel, reference


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        rows: rows and columns of a tile.
        width: entries of rows that are multiplied at once.
        warps: per program.
        stages: how many steps of ``width`` are in shared memory, at most.
        per_processor: programs that fit on one multiprocessor.
    """

    rows: int
    width: int
    warps: int
    stages: int
    per_processor: int


# By the number of tokens: the first that holds them all, or the last. The last one's two sums take
# 128 registers of each thread: nothing else fits beside it. Tiles of 64 rows would read twice as
# much from the L2 cache, more than it gives. Below 64 rows reading all operands once is what
# takes time; small tiles leave room for many programs, whose reads wait side by side.
TILES = (
    Tile(16, 128, 1, 4, 14),
    Tile(32, 128, 2, 4, 7),
    Tile(64, 64, 4, 5, 3),
    Tile(128, 64, 8, 5, 1),
)

# To write a part of a tile's sums, and to read it, takes as long as to multiply rows of some 600.
SPLIT_WIDTH = 1024
# One program reads all parts of a tile.
MAX_SPLITS = 16


@dataclass(frozen=True)
class Device:
    """What counts of a GPU.

    Attributes:
        processors: multiprocessors.
        descriptors: whether it reads memory by tensor descriptors.
        hopper: whether it has the shared memory of Hopper or of data centres' Blackwell.
        interpreted: the CPU, on which Triton interprets.
    """

    processors: int
    descriptors: bool
    hopper: bool
    interpreted: bool = False


# Few processors, so that programs go through several tiles, and split others.
INTERPRETER = Device(processors=3, descriptors=True, hopper=True, interpreted=True)


def ghost_norm(left: Tensor, right: Tensor, left_error: float, right_error: float) -> Tensor:
    """`op.ghost_norm` for CUDA tensors. Does not synchronise with the host."""
    if 0 in (*left.shape, right.shape[2]):
        return reference.ghost_norm(left, right, left_error, right_error).float()
    rows = left.mT, right
    # Written by the kernel.
    norms = tuple(left.new_empty(right.shape[:2], dtype=torch.float32) for _ in rows)
    return _launch((*rows, *rows), norms * 2, (1 + 2 * left_error, 1 + 2 * right_error))


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
    return _launch(rows, tuple(x.contiguous() for x in norms), None)


def _launch(
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    norms: tuple[Tensor, ...],
    factors: tuple[float, float] | None,
) -> Tensor:
    """Start `kernel.sums_kernel` on rows [B, T, m], [B, T, n], [B, S, m] and [B, S, n].

    Without ``factors`` the norms are there; with them, the second two operands are the first two.
    """
    (samples, tokens, m), (_, tokens2, n) = rows[0].shape, rows[3].shape
    symmetric = factors is not None
    device = _device(rows[0].device)
    tile = _tile(max(tokens, tokens2))
    blocks, blocks2 = triton.cdiv(tokens, tile.rows), triton.cdiv(tokens2, tile.rows)
    tiles = blocks * (blocks + 1) // 2 if symmetric else blocks * blocks2
    # Two operands take twice the shared memory of one.
    per_processor = tile.per_processor if symmetric else max(1, tile.per_processor // 2)
    programs = device.processors * per_processor
    whole, splits = _split(samples * tiles, programs, m + n)
    split = samples * tiles - whole

    def scratch(size: int) -> Tensor:
        return rows[0].new_empty(size, dtype=torch.float32)

    out = rows[0].new_empty((4 if symmetric else 3, samples), dtype=torch.float32)
    one = tiles == 1
    partials = out if one else scratch(samples * tiles * 4)
    parts = scratch(split * splits * 2 * tile.rows**2) if split else out
    if one and not split:
        counters = rows[0].new_empty(1, dtype=torch.int32)
    else:
        counters = rows[0].new_zeros(2 * samples + 1 + split, dtype=torch.int32)
    described = [_described(x, device.descriptors) for x in rows[: 2 if symmetric else 4]]
    described = described * 2 if symmetric else described
    with torch.cuda.device_of(out):
        if device.descriptors and not device.interpreted:
            # Of the calling thread, and of nothing else: the backward has threads of its own.
            triton.set_allocator(_allocate)
        kernel.sums_kernel[(min(whole + split * splits, programs),)](
            *(x for x, *_ in described),
            *norms,
            out,
            partials,
            parts,
            counters,
            samples,
            tokens,
            tokens2,
            m,
            n,
            *(x for _, sample, outer, _ in described for x in (sample, outer)),
            *(factors or (0.0, 0.0)),
            whole,
            splits,
            LAYOUTS=tuple(row_major for *_, row_major in described),
            SYMMETRIC=symmetric,
            ONE=one,
            TMA=device.descriptors,
            UPCAST=device.interpreted,
            TILE=tile.rows,
            BLOCK=tile.width,
            num_warps=tile.warps,
            num_stages=tile.stages if device.hopper else min(tile.stages, 3),
        )
    return out


def _tile(tokens: int) -> Tile:
    return next((tile for tile in TILES if tile.rows >= tokens), TILES[-1])


def _split(tiles: int, programs: int, width: int) -> tuple[int, int]:
    """Return how many tiles are made as a whole, and in how many parts each other is.

    If few tiles are left for the last round of all programs, they are cut along their rows.
    """
    rest = tiles % programs
    splits = min(programs // rest, width // SPLIT_WIDTH, MAX_SPLITS) if rest else 1
    return (tiles - rest, splits) if splits > 1 else (tiles, 1)


def _described(x: Tensor, descriptors: bool) -> tuple[Tensor, int, int, bool]:
    """Return rows [B, T, width] as the kernel reads them: strides, and whether rows are contiguous.

    The strides are those of samples, and of rows or, if rows lie side by side, of places. One dim
    must be contiguous and all else multiples of 16 bytes (without descriptors, the contiguous
    dim's size as well). What is not (a vocabulary of 50257) is copied: to read it entry by entry
    would take several times as long.
    """
    samples, tokens, width = x.shape
    sample, token, place = x.stride()
    vector = 16 // x.element_size()
    if x.data_ptr() % 16 == 0:
        for contiguous, inner, outer, inner_size, outer_size in (
            (True, place, token, width, tokens),
            (False, token, place, tokens, width),
        ):
            # Strides of dims of size 1 mean nothing; they are replaced by some that serve.
            inner = 1 if inner_size == 1 else inner
            outer = _round_up(inner_size, vector) if outer_size == 1 else outer
            each = outer * outer_size if samples == 1 else sample
            multiples = (outer, each) if descriptors else (outer, each, inner_size)
            if inner == 1 and all(size > 0 and size % vector == 0 for size in multiples):
                return x, each, outer, contiguous
    outer = _round_up(width, vector)
    copy = x.new_empty((samples, tokens, outer))
    copy[..., :width].copy_(x)
    if outer > width and not descriptors:
        copy[..., width:].zero_()
    return copy, tokens * outer, outer, True


def _round_up(a: int, b: int) -> int:
    return triton.cdiv(a, b) * b


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Give Triton memory for the descriptors of a launch, on the current device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@functools.lru_cache
def _device(device: torch.device) -> Device:
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return Device(
        processors=properties.multi_processor_count,
        descriptors=properties.major >= 9,
        hopper=properties.major in (9, 10),
    )
