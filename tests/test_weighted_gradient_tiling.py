"""How flashnorm::weighted_gradients cuts results into tiles, and tokens into parts."""

from __future__ import annotations

import pytest

from flashnorm_compile.kernels.weighted_gradient import tiling


@pytest.mark.parametrize("tiles", [1, 54, 1179])
@pytest.mark.parametrize("steps", [1, 16, 4096])
def test_no_part_of_the_tokens_is_empty_and_few_tiles_are_shared(tiles, steps):
    for tile in tiling.LARGE_TILES + tiling.SMALL_TILES:
        splits = tiling.count_splits(tiles, steps, tile, 132)
        assert 1 <= splits <= steps
        assert splits == 1 or tiles * splits <= 132 * tile.per_processor * tiling.SPLIT_TILES


def test_the_gpu_is_filled():
    for (m, n, tokens), expected in (((8192, 2048, 512), 1), ((768, 768, 1024), 7)):
        tile = tiling.choose_tile(m, n, tokens, tiling.LARGE_TILES + tiling.SMALL_TILES)
        assert (tile.m, tile.n, tile.tokens) == (128, 256, 64)
        tiles, steps = m * n // (tile.m * tile.n), 16 * tokens // tile.tokens
        assert tiling.count_splits(tiles, steps, tile, 132) == expected


def test_samples_are_cut_into_steps_that_fit():
    steps = {16: 16, 32: 32, 64: 64, 77: 32, 128: 64, 197: 32, 256: 64, 1: 16}
    for tokens, expected in steps.items():
        assert tiling.choose_tile(768, 768, tokens, tiling.LARGE_TILES).tokens == expected
