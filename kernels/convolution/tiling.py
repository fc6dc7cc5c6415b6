"""Tiles and schedules for the shapes of convolutions: small tables, no measuring at run time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from flashnorm_compile.kernels.division import cdiv

# Elements of the weight that one program takes: those of a longer row are taken one by one.
MAX_TAPS = 4
# Bytes and registers of a multiprocessor.
SHARED_MEMORY = 227 * 1024
REGISTERS = 65536
# What a program costs beside its samples, in boxes: to make descriptors and wait for the first
# boxes; and to write a tile that is added up later, and to read it again.
START_BOXES = 10.0
WRITE_BOXES = 15.0
MAX_WAVES = 8
# Parts of a sample are no smaller, in boxes.
LEAST_PART = 4


@dataclass(frozen=True)
class Tile:
    """How one program works.

    Attributes:
        taps: elements of the weight's row.
        outer: channels of the gradient.
        inner: channels of the input; without boxes, columns of the weight.
        rows: of a box of positions; 1 without boxes.
        columns: of a box of positions.
        warps: of a program.
        stages: boxes in memory: one that is multiplied, the others being loaded.
        per_processor: programs that run on a multiprocessor at once.
    """

    taps: int
    outer: int
    inner: int
    rows: int
    columns: int
    warps: int
    stages: int
    per_processor: int


@functools.cache
def choose_boxes(
    mode: str,
    outer: int,
    inner: int,
    kernel_width: int,
    positions: tuple[int, int],
    element_size: int,
    *,
    exact: bool,
) -> Tile:
    """Return the tile of `boxes.boxes_kernel`, of those that were fastest on an H100.

    Args:
        mode: "store", "square" or "weight".
        outer: channels of the gradient in a group.
        inner: channels of the input in a group.
        kernel_width: elements in a row of the weight.
        positions: rows and columns of the gradient.
        element_size: bytes of an operand's element.
        exact: whether products are made in float32, without matrix units.
    """
    half = element_size == 2
    # Only a square leaves registers for a large tile: a tile that is stored is converted first, and
    # weighted ones need two sets of sums. Matrix units multiply 64 rows at once.
    tile_outer = 128 if mode == "square" and half and outer > 64 else 64
    wide = half and inner >= 128
    taps = 1 if wide or exact or kernel_width > MAX_TAPS else kernel_width
    tile_inner = _power_of_2(inner, 16, 128 if wide else 64)
    rows, columns = choose_box(*positions, box_size(element_size, exact))
    warps = tile_outer // 16
    stages = 2 if tile_outer == 128 and taps > 1 else 3
    memory = stages * rows * columns * (tile_outer + taps * tile_inner) * element_size
    sums = tile_outer * tile_inner * taps // (32 * warps) * (2 if mode == "weight" else 1)
    registers = 255 if exact else min(255, 48 + sums)
    fit = min(SHARED_MEMORY // (memory + 1024), REGISTERS // (32 * warps * registers), 4)
    return Tile(taps, tile_outer, tile_inner, rows, columns, warps, stages, max(fit, 1))


def box_size(element_size: int, exact: bool) -> int:
    """Return how many positions a box holds at most.

    Without matrix units, both operands of a product are kept in registers.
    """
    return 16 if exact else 128 // element_size


def choose_box(rows: int, columns: int, size: int) -> tuple[int, int]:
    """Return rows and columns of the box of at most ``size`` positions that wastes least.

    At least 16 positions, which matrix units multiply at once; as wide as possible.
    """
    size = max(16, min(size, _power_of_2(rows, 1, size) * _power_of_2(columns, 1, size)))

    def boxes(width: int) -> int:
        return cdiv(rows, size // width) * cdiv(columns, width)

    width = min((2**i for i in reversed(range(size.bit_length()))), key=boxes)
    return size // width, width


def choose_elements(outer: int, columns: int, *, exact: bool) -> Tile:
    """Return the tile of `elements.elements_kernel`; ``columns`` are the weight's in a group."""
    return Tile(
        taps=1,
        outer=_power_of_2(outer, 16, 64),
        inner=_power_of_2(columns, 16, 64),
        rows=1,
        columns=16 if exact else 32,
        warps=4,
        stages=2,
        per_processor=2,
    )


@functools.lru_cache(4096)
def schedule(
    samples: int, tiles: int, boxes: int, processors: int, per_processor: int, *, weighted: bool
) -> tuple[int, int]:
    """Return into how many parts samples are cut, and how many parts a program takes.

    Args:
        samples: B.
        tiles: of a sample.
        boxes: of a sample's positions.
        processors: multiprocessors.
        per_processor: programs that run on each at once.
        weighted: whether programs write what they add up, rather than each sample's tile.
    """
    programs = processors * per_processor
    parts = 1
    if 2 * samples * tiles <= processors:
        parts = max(1, min(programs // (samples * tiles), boxes // LEAST_PART))
    units = samples * parts
    start = (START_BOXES + (WRITE_BOXES if weighted else 0.0)) / cdiv(boxes, parts)

    def time(units_each: int) -> float:
        return cdiv(tiles * cdiv(units, units_each), programs) * (units_each + start)

    waves = range(1, MAX_WAVES + 1)
    candidates = {cdiv(units, max(1, min(units, programs * n // tiles))) for n in waves}
    return parts, min(sorted(candidates, reverse=True), key=time)


def _power_of_2(n: int, least: int, most: int) -> int:
    """Return the first power of 2 that is at least n, within limits that are powers of 2."""
    return max(least, min(most, 1 << max(n - 1, 0).bit_length()))
