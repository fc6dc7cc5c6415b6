"""What a launch does: tiles, which of them are split, and how operands are read."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from flashnorm_compile.kernels.device import Device
from flashnorm_compile.kernels.division import cdiv, round_up
from flashnorm_compile.kernels.operands import Layout, find_layout

# Of a number, in bytes; and numbers that make up 16 bytes.
NUMBER = 2
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

# To write a part of a tile's sums, and to read it, takes as long as to multiply rows of some 1500:
# on an H100, 132 + 60 tiles of rows of 3840 took 77 µs whole, and 83 µs with the last 60 in halves.
SPLIT_WIDTH = 2048
# One program reads all parts of a tile.
MAX_SPLITS = 16


# Longer rows of left are multiplied by the library. Programs that read the same rows drift apart on
# the way, until the L2 cache does not hold what they share: on an H100 with T = 1024 and 50264
# places the kernel took 3.6 ms, two products and sums by the library 2.6 ms; with T = 512 and 32000
# places, 0.35 and 0.40 ms.
LONG_WIDTH = 2**15


@dataclass(frozen=True)
class Way:
    """What the sites of one launch have in common.

    Attributes:
        dtype: of the operands.
        along: of left, right, left2 and right2, what lies side by side: "places" or "tokens".
        tokens: of left and right.
        tokens2: of left2 and right2.
        tile: the size of tiles.
        symmetric: whether there is one site, not two whose inner product is asked for.
        given: whether left's rows are multiplied by each other before.
    """

    dtype: torch.dtype
    along: tuple[str, ...]
    tokens: int
    tokens2: int
    tile: Tile
    symmetric: bool
    given: bool


@dataclass(frozen=True)
class Reading:
    """How one site is read, whatever the batch size makes of the strides.

    Attributes:
        way: what sites that are launched together share.
        widths: m and n, of the rows.
        strides: of each operand: of samples, and of tokens or, if these lie side by side, of
            places.
        copied: the operands that the kernel cannot read where they are, with the width of rows that
            they are copied to.
    """

    way: Way
    widths: tuple[int, int]
    strides: tuple[int, ...]
    copied: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """What a launch does.

    Attributes:
        one: whether a sample of a site has one tile.
        whole: the first so many tiles are made by one program each.
        splits: the others are made in so many parts.
        programs: how many are started.
        scratch: float32 numbers.
        counters: int32 zeros; 0 if there are none.
    """

    one: bool
    whole: int
    splits: int
    programs: int
    scratch: int
    counters: int


# Made once: a step has many layers of one shape.
@functools.lru_cache(maxsize=4096)
def read(
    lies: tuple[tuple[torch.Size, tuple[int, ...], bool], ...], dtype: torch.dtype, device: Device
) -> Reading:
    """Return how operands of these shapes and strides are read, 16-byte aligned or not."""
    (_, tokens, m), (_, tokens2, n) = lies[0][0], lies[-1][0]
    symmetric = len(lies) == 2
    layouts, copied = [], []
    for operand, (shape, stride, aligned) in enumerate(lies):
        layout = find_layout(shape, stride, NUMBER, aligned, device.descriptors)
        if layout.along == "any":
            # To read it entry by entry (a vocabulary of 50257) would take several times as long.
            width = round_up(shape[2], VECTOR)
            layout = Layout("places", (shape[1] * width, width, 1))
            copied.append((operand, width))
        layouts.append(layout)
    if symmetric:
        layouts *= 2
    tile = _tile(max(tokens, tokens2))
    along = tuple(layout.along for layout in layouts)
    given = symmetric and tokens > tile.rows and m > LONG_WIDTH
    return Reading(
        way=Way(dtype, along, tokens, tokens2, tile, symmetric, given),
        widths=(m, n),
        strides=tuple(stride for layout in layouts for stride in _outer_strides(layout)),
        copied=tuple(copied),
    )


@functools.lru_cache(maxsize=4096)
def plan(way: Way, samples: int, sites: int, width: int, device: Device) -> Plan:
    """Plan a launch for some sites, of which the least m + n is ``width``."""
    gradients = samples * sites
    blocks, blocks2 = cdiv(way.tokens, way.tile.rows), cdiv(way.tokens2, way.tile.rows)
    tiles = blocks * (blocks + 1) // 2 if way.symmetric else blocks * blocks2
    # Two operands take twice the shared memory of one.
    per_processor = way.tile.per_processor
    programs = device.processors * (per_processor if way.symmetric else max(1, per_processor // 2))
    whole, splits = _split(gradients * tiles, programs, 0 if way.given else width)
    split = gradients * tiles - whole
    return Plan(
        one=tiles == 1,
        whole=whole,
        splits=splits,
        programs=min(whole + split * splits, programs),
        scratch=split * splits * 2 * way.tile.rows**2 + gradients * (4 * tiles + 2 * way.tokens),
        counters=0 if tiles == 1 and not split else 2 * gradients + 1 + split,
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


def _outer_strides(layout: Layout) -> tuple[int, int]:
    sample, token, place = layout.strides
    return sample, token if layout.along == "places" else place
