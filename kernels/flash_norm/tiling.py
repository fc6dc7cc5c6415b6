"""How the product of a sample is cut into tiles, and its tokens into parts."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from flashnorm_compile.kernels.division import cdiv, round_up


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        m: rows of the product.
        n: columns of the product.
        tokens: tokens multiplied at once.
        warps: per program.
        stages: how many steps of ``tokens`` are in shared memory, if they fit.
        per_processor: programs that fit on one multiprocessor.
        speed: multiplications per second, as a share of the fastest tile's; an estimate.
    """

    m: int
    n: int
    tokens: int
    warps: int
    stages: int
    per_processor: int
    speed: float


# The larger a tile, the less is read per multiplication: the first needs 7 TB/s from the L2 cache
# at 600 TFLOP/s, one of 128 x 128 a third more. Its sums take 128 registers of each thread, its
# steps of bfloat16 48 KiB each, of the 227 KiB of a multiprocessor.
TENSOR_CORE_TILES = (
    Tile(128, 256, 64, 8, 4, 1, 1.0),
    Tile(256, 128, 64, 8, 4, 1, 0.95),
    Tile(128, 128, 64, 4, 3, 2, 0.8),
    Tile(64, 256, 64, 4, 4, 1, 0.7),
    Tile(128, 64, 64, 4, 3, 3, 0.55),
    Tile(64, 64, 64, 4, 3, 3, 0.35),
    Tile(128, 32, 64, 4, 3, 3, 0.3),
    Tile(64, 32, 64, 4, 3, 4, 0.2),
    Tile(128, 16, 64, 4, 3, 4, 0.17),
    Tile(64, 16, 64, 4, 3, 4, 0.12),
)
# Where operands are not read by tensor descriptors: GPUs before Hopper, and strides that are no
# multiples of 16 bytes, whose elements go through registers one by one.
POINTER_TILES = (
    Tile(128, 128, 32, 8, 3, 1, 1.0),
    Tile(64, 64, 32, 4, 3, 2, 0.6),
    Tile(64, 16, 32, 4, 3, 4, 0.2),
)
# Without tensor cores. Those of TF32 take operands whose tokens lie side by side: others go
# through registers.
FLOAT32_TILES = (
    Tile(128, 128, 16, 8, 3, 2, 1.0),
    Tile(64, 64, 16, 4, 3, 4, 0.7),
    Tile(64, 16, 16, 4, 3, 4, 0.3),
)

# Splitting the tokens is worth it if it saves more than writing a tile in float32 and reading it
# again costs: about as much as multiplying this many tokens.
SPLIT_TOKENS = 512
# At most this many tiles per program go to memory in float32: 70 MB on an H100.
SPLIT_TILES = 4

# Shared memory for barriers, a matrix of ones and sums over the warps.
OTHER_SHARED_BYTES = 2560


@functools.lru_cache(maxsize=1024)
def choose_tile(m: int, n: int, tokens: int, dtype: torch.dtype, descriptors: bool) -> Tile:
    """Return the tile that takes the least time for products [m, n].

    Args:
        m: rows of each product.
        n: columns of each product.
        tokens: T, what is summed over.
        dtype: of the operands.
        descriptors: whether both operands are read by tensor descriptors.
    """
    tiles: tuple[Tile, ...] = TENSOR_CORE_TILES if descriptors else POINTER_TILES
    if dtype == torch.float32:
        tiles = FLOAT32_TILES
    tile = min(tiles, key=lambda x: round_up(m, x.m) * round_up(n, x.n) / x.speed)
    # Half as many tokens at once, if much of the last step would be empty (T = 197).
    if tile.tokens == 64 and round_up(tokens, 64) > 1.1 * round_up(tokens, 32):
        return dataclasses.replace(tile, tokens=32, stages=2 * tile.stages - 2)
    return tile


def count_stages(tile: Tile, dtype: torch.dtype, out_dtype: torch.dtype | None, shared: int) -> int:
    """Return how many steps are in shared memory at once.

    Args:
        tile: the tile.
        dtype: of the operands.
        out_dtype: of the tiles that are written, half a tile at a time; None if none is.
        shared: bytes of shared memory.
    """
    free = shared - OTHER_SHARED_BYTES
    if out_dtype is not None:
        free -= tile.m * tile.n // 2 * out_dtype.itemsize
    return min(tile.stages, free // (tile.tokens * (tile.m + tile.n) * dtype.itemsize))


@functools.lru_cache(maxsize=1024)
def count_splits(tiles: int, tokens: int, tile: Tile, programs: int) -> int:
    """Return the number of parts in which the tokens are summed, 1 if there is enough to do.

    The time is that of the program with most to do.

    Args:
        tiles: of the products of all samples.
        tokens: T of each sample.
        tile: their size.
        programs: how many run at once.
    """
    steps = cdiv(tokens, tile.tokens)
    scratch = cdiv(SPLIT_TOKENS, tile.tokens)
    best, best_time = 1, cdiv(tiles, programs) * steps
    for splits in range(2, min(steps, SPLIT_TILES * programs // tiles) + 1):
        time = cdiv(tiles * splits, programs) * (cdiv(steps, splits) + scratch)
        if time < best_time:
            best, best_time = splits, time
    # None of the parts is empty.
    return cdiv(steps, cdiv(steps, best))
