"""Tiles and schedules for the shapes of convolutions: small tables, no measuring at run time."""

from __future__ import annotations

from dataclasses import dataclass

# Elements of the weight that one program takes: those of a longer row are taken one by one.
MAX_TAPS = 4
SHARED_MEMORY = 227 * 1024
REGISTERS = 65536
MAX_WAVES = 8
# What a program costs beside its samples, in boxes: to make descriptors and wait for the first
# boxes; and to write a tile that is added up later, and to read it again.
START_BOXES = 10.0
WRITE_BOXES = 15.0
# Parts of a sample are no smaller.
PART_BOXES = 4


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


def cdiv(a: int, b: int) -> int:
    """Return a/b, rounded up."""
    return -(-a // b)


def choose_boxes(
    outer: int,
    inner: int,
    kernel_width: int,
    positions: tuple[int, int],
    element_size: int,
    *,
    exact: bool,
    weighted: bool,
) -> Tile:
    """Return the tile of `boxes.boxes_kernel`.

    Args:
        outer: channels of the gradient in a group.
        inner: channels of the input in a group.
        kernel_width: elements in a row of the weight.
        positions: rows and columns of the gradient.
        element_size: bytes of an operand's element.
        exact: whether products are made in float32, without matrix units.
        weighted: whether a second set of sums is kept in registers.
    """
    taps = kernel_width if kernel_width <= MAX_TAPS and not exact else 1
    # Matrix units multiply 64 rows at once.
    tile_outer = 64 if exact or outer <= 64 else 128
    if weighted and tile_outer == 128 and taps > 1 and inner >= 128:
        taps = 1
    tile_inner = _power_of_2(inner, 16, 128 if taps == 1 and not exact else 64)
    if weighted and tile_outer * taps * tile_inner > 128 * 128:
        tile_inner //= 2
    # Without matrix units both operands are kept in registers.
    box = choose_box(*positions, 16 if exact else 128 // element_size)
    warps = tile_outer // 16
    sums = tile_outer * tile_inner * taps // (32 * warps)
    stages = 3
    memory = stages * box[0] * box[1] * (tile_outer + taps * tile_inner) * element_size
    registers = 255 if exact else min(255, 48 + (2 if weighted else 1) * sums)
    return Tile(
        taps=taps,
        outer=tile_outer,
        inner=tile_inner,
        rows=box[0],
        columns=box[1],
        warps=warps,
        stages=stages,
        per_processor=max(
            1, min(SHARED_MEMORY // (memory + 1024), REGISTERS // (32 * warps * registers), 4)
        ),
    )


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
        columns=16 if exact else 64,
        warps=4,
        stages=2,
        per_processor=2 if exact else 4,
    )


def schedule(
    samples: int, tiles: int, boxes: int, programs: int, *, weighted: bool
) -> tuple[int, int]:
    """Return into how many parts samples are cut, and how many parts a program takes.

    Args:
        samples: B.
        tiles: of a sample.
        boxes: of a sample's positions.
        programs: that run at once.
        weighted: whether programs write what they add up.
    """
    parts = 1
    if 2 * samples * tiles <= programs:
        parts = max(1, min(programs // (samples * tiles), boxes // PART_BOXES))
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
