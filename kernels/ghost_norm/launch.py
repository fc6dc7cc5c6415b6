"""From tensors to kernels: layouts, tiles and scratch memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashnorm_compile.kernels.ghost_norm import kernel, reference

# Numbers of 16 bits that make up 16 bytes.
VECTOR = 8


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
# 128 registers of each thread: nothing else fits beside it. Tiles of 64 rows read twice as much
# from the L2 cache, more than it gives. Below 64 rows reading all operands once is what takes
# time; small tiles leave room for many programs, whose reads wait side by side.
TILES = (
    Tile(16, 128, 1, 4, 8),
    Tile(32, 128, 2, 4, 7),
    Tile(64, 64, 4, 5, 3),
    Tile(128, 64, 8, 5, 1),
)

# To write a part of a tile's sums, and to read it, takes as long as to multiply rows of some 1500: on
# an H100, 132 + 60 tiles of rows of 3840 took 77 µs whole, and 83 µs with the last 60 in halves.
SPLIT_WIDTH = 2048
# One program reads all parts of a tile.
MAX_SPLITS = 16


# Longer rows of left are multiplied by the library. Programs that read the same rows drift apart on
# the way, until the L2 cache does not hold what they share: on an H100 with T = 1024 and 50264
# places the kernel took 3.6 ms, two products and sums by the library 2.6 ms; with T = 512 and 32000
# places, 0.35 and 0.40 ms.
LONG_WIDTH = 2**15


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


@dataclass(frozen=True)
class Layout:
    """How rows [B, T, width] lie in memory.

    Attributes:
        sample: stride of samples.
        outer: stride of rows or, if rows lie side by side, of places in them.
        contiguous: whether rows are contiguous.
        copied: whether the kernel cannot read the rows where they are.
    """

    sample: int
    outer: int
    contiguous: bool
    copied: bool


@dataclass(frozen=True)
class Plan:
    """All of a launch that follows from sizes and strides.

    Attributes:
        layouts: of left, right, left2 and right2.
        tile: the size of tiles.
        one: whether a sample has one tile.
        given: whether left's rows are multiplied by each other before.
        whole: the first so many tiles are made by one program each.
        splits: the others are made in so many parts.
        programs: how many are started.
        scratch: float32 numbers.
        counters: int32 zeros; 0 if there are none.
    """

    layouts: tuple[Layout, ...]
    tile: Tile
    one: bool
    given: bool
    whole: int
    splits: int
    programs: int
    scratch: int
    counters: int


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
    device = _device(first.device)
    lies = tuple((x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in rows)
    # Made once: a step has many layers of one shape.
    plan = _plan(lies, device)
    layouts = plan.layouts
    if any(layout.copied for layout in layouts):
        rows = tuple(_copy(x, y) for x, y in zip(rows, layouts[: len(rows)], strict=True))
    (samples, tokens, m), (_, tokens2, n) = lies[0][0], lies[-1][0]
    if plan.given:
        rows = _products(rows[0]), rows[1]
    out = first.new_empty((3 if norms else 4, samples), dtype=torch.float32)
    scratch = first.new_empty(plan.scratch, dtype=torch.float32)
    counters = first.new_zeros(plan.counters, dtype=torch.int32)
    with torch.cuda.device_of(out):
        if device.descriptors and not device.interpreted:
            # Of the calling thread, and of nothing else: the backward has threads of its own.
            triton.set_allocator(_allocate)
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
            *(stride for layout in layouts for stride in (layout.sample, layout.outer)),
            *factors,
            plan.whole,
            plan.splits,
            LAYOUTS=tuple(layout.contiguous for layout in layouts),
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


@functools.lru_cache(maxsize=4096)
def _plan(lies: tuple[tuple[torch.Size, tuple[int, ...], bool], ...], device: Device) -> Plan:
    """Plan a launch for operands of these shapes and strides, 16-byte aligned or not."""
    (samples, tokens, m), (_, tokens2, n) = lies[0][0], lies[-1][0]
    symmetric = len(lies) == 2
    layouts = tuple(_layout(*each, device.descriptors) for each in lies)
    tile = _tile(max(tokens, tokens2))
    blocks, blocks2 = triton.cdiv(tokens, tile.rows), triton.cdiv(tokens2, tile.rows)
    tiles = blocks * (blocks + 1) // 2 if symmetric else blocks * blocks2
    # Two operands take twice the shared memory of one.
    per_processor = tile.per_processor if symmetric else max(1, tile.per_processor // 2)
    programs = device.processors * per_processor
    given = symmetric and tiles > 1 and m > LONG_WIDTH
    whole, splits = _split(samples * tiles, programs, 0 if given else m + n)
    split = samples * tiles - whole
    return Plan(
        layouts=layouts * 2 if symmetric else layouts,
        tile=tile,
        one=tiles == 1,
        given=given,
        whole=whole,
        splits=splits,
        programs=min(whole + split * splits, programs),
        scratch=split * splits * 2 * tile.rows**2 + samples * (4 * tiles + 2 * tokens),
        counters=0 if tiles == 1 and not split else 2 * samples + 1 + split,
    )


def _tile(tokens: int) -> Tile:
    return next((tile for tile in TILES if tile.rows >= tokens), TILES[-1])


def _split(tiles: int, programs: int, width: int) -> tuple[int, int]:
    """Return how many tiles are made as a whole, and in how many parts each other is.

    If few tiles are left for the last round of all programs, they are cut along their rows.
    """
    rest = tiles % programs
    splits = min(programs // rest, width // SPLIT_WIDTH, MAX_SPLITS) if rest else 1
    return (tiles - rest, splits) if splits > 1 else (tiles, 1)


def _layout(
    shape: torch.Size, stride: tuple[int, ...], aligned: bool, descriptors: bool
) -> Layout:
    """Say how the kernel reads rows [B, T, width].

    One dim must be contiguous and all else multiples of 16 bytes (without descriptors, the
    contiguous dim's size as well). What is not (a vocabulary of 50257) is copied: to read it entry
    by entry would take several times as long.
    """
    (samples, tokens, width), (sample, token, place) = shape, stride
    for contiguous, inner, outer, inner_size, outer_size in (
        (True, place, token, width, tokens),
        (False, token, place, tokens, width),
    ):
        # Strides of dims of size 1 mean nothing; they are replaced by some that serve.
        inner = 1 if inner_size == 1 else inner
        outer = _round_up(inner_size) if outer_size == 1 else outer
        each = outer * outer_size if samples == 1 else sample
        multiples = (outer, each) if descriptors else (outer, each, inner_size)
        if aligned and inner == 1 and all(x > 0 and x % VECTOR == 0 for x in multiples):
            return Layout(each, outer, contiguous, False)
    outer = _round_up(width)
    return Layout(tokens * outer, outer, True, True)


def _copy(x: Tensor, layout: Layout) -> Tensor:
    """Copy rows to where the kernel can read them, with zeros up to a multiple of 16 bytes."""
    if not layout.copied:
        return x
    (samples, tokens, width), outer = x.shape, layout.outer
    copy = x.new_empty((samples, tokens, outer))
    copy[..., :width].copy_(x)
    copy[..., width:].zero_()
    return copy


def _products(rows: Tensor) -> Tensor:
    """Multiply all rows of a sample by each other: [B, T, width] to float32 [B, T, T]."""
    if not rows.is_cuda:
        return rows.float() @ rows.float().mT
    return torch.bmm(rows, rows.mT, out_dtype=torch.float32)


def _round_up(size: int) -> int:
    return triton.cdiv(size, VECTOR) * VECTOR


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
