"""How the result is cut into tiles, and the tokens of all samples into parts."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from flashnorm_compile.kernels.division import cdiv


@dataclass(frozen=True)
class Tile:
    """What one program works on.

    Attributes:
        m: rows of the result.
        n: columns of the result.
        tokens: tokens of a sample multiplied at once.
        warps: per program.
        stages: how many steps of ``tokens`` are in shared memory.
        per_processor: programs that fit on one multiprocessor.
        speed: multiplications per second, as a share of the fastest tile's; an estimate.
        pause: what the end of a sample costs, in tokens; an estimate.
    """

    m: int
    n: int
    tokens: int
    warps: int
    stages: int
    per_processor: int
    speed: float
    pause: int


# For tensor cores and copy engines as Hopper's. The larger a tile, the less is read for each
# multiplication: the first needs 7 TB/s from the L2 cache at 600 TFLOP/s, one of 128 x 128 a third
# more. Its sums take 128 registers of each thread, its steps 192 of the 227 KiB of a
# multiprocessor's shared memory. At the end of a sample the tensor cores wait until the sums are
# scaled, some 450 cycles; where programs share a multiprocessor, one does while another multiplies.
LARGE_TILES = (
    Tile(128, 256, 64, 8, 4, 1, 1.0, 28),
    Tile(256, 128, 64, 8, 4, 1, 0.98, 28),
)
# Also for two operands whose tokens lie side by side: of larger tiles ptxas would then make the
# tensor cores wait for every product.
SMALL_TILES = (
    Tile(128, 128, 64, 4, 3, 2, 0.88, 8),
    Tile(64, 256, 64, 4, 4, 1, 0.6, 28),
    Tile(64, 128, 64, 4, 3, 3, 0.55, 8),
    Tile(128, 64, 64, 4, 3, 3, 0.55, 8),
    Tile(64, 64, 64, 4, 4, 3, 0.35, 8),
)
# GPUs before Hopper, and operands that are not aligned: their addresses take registers too.
OTHER_TILES = (
    Tile(128, 128, 32, 8, 3, 1, 1.0, 16),
    Tile(64, 64, 32, 4, 3, 2, 0.6, 8),
)
TF32_TILES = (Tile(128, 128, 32, 8, 3, 1, 1.0, 16),)
# Without tensor cores. Larger tiles do not fit into registers for every order of the operands.
FLOAT32_TILES = (Tile(64, 64, 16, 4, 3, 4, 1.0, 8),)

# Steps shorter than a tile's 64 tokens, with as much in shared memory: (tokens, stages). One step
# costs as much time as STEP_TOKENS more.
SHORT_STEPS = ((32, 6), (16, 8))
STEP_TOKENS = 8

# Writing a tile in float32, reading it again, and starting a program cost as much as multiplying
# this many tokens.
SPLIT_TOKENS = 768
# At most this many tiles per program go to memory in float32: some 35 MB on an H100.
SPLIT_TILES = 2


@functools.lru_cache(maxsize=1024)
def choose_tile(m: int, n: int, tokens: int, tiles: tuple[Tile, ...]) -> Tile:
    """Return the tile that takes the least time for products [m, T] x [T, n] of many samples.

    It does not depend on the number of samples: another tile is another compilation.

    Args:
        m: rows of the result.
        n: columns of the result.
        tokens: T of each sample.
        tiles: to choose from.
    """

    def time(tile: Tile) -> float:
        sample = cdiv(tokens, tile.tokens) * (tile.tokens + STEP_TOKENS) + tile.pause
        return cdiv(m, tile.m) * tile.m * cdiv(n, tile.n) * tile.n * sample / tile.speed

    shorter = [
        dataclasses.replace(tile, tokens=size, stages=stages)
        for tile in tiles
        if tile.tokens == 64
        for size, stages in SHORT_STEPS
    ]
    return min((*tiles, *shorter), key=time)


@functools.lru_cache(maxsize=1024)
def count_splits(tiles: int, steps: int, tile: Tile, processors: int) -> int:
    """Return the number of parts in which the tokens are summed, 1 if there is enough to do.

    The time is that of the multiprocessor with most to do.

    Args:
        tiles: of all results.
        steps: of ``tile.tokens``, over all samples.
        tile: their size.
        processors: multiprocessors of the GPU.
    """
    programs = processors * tile.per_processor

    def time(splits: int) -> int:
        scratch = 0 if splits == 1 else SPLIT_TOKENS
        return cdiv(tiles * splits, programs) * (cdiv(steps, splits) * tile.tokens + scratch)

    return min(range(1, max(1, min(steps, SPLIT_TILES * programs // tiles)) + 1), key=time)
