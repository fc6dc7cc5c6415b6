"""flashnorm::flash_norm and flashnorm::materialize_norm: products by sample, and their norms."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from interpreter import run_interpreted

from flashnorm_compile.kernels.flash_norm import op, reference, tiling
from flashnorm_compile.kernels.flash_norm.op import (
    flash_norm,
    materialize_norm,
    materialize_norms,
)
from flashnorm_compile.kernels.flash_norm.tiling import choose_tile, count_splits, count_stages

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Samples, m, tokens, n.
SHAPES = [
    (3, 150, 70, 300),  # more than one tile each way, and more than a step
    (5, 72, 33, 24),
    (2, 7, 5, 9),  # no stride is a multiple of 16 bytes
    (7, 1, 1, 1),
    (1, 16, 3, 257),
    (1, 40, 100, 26),  # the tokens are split
    (2, 7, 70, 18),
    (0, 4, 5, 6),
    (2, 0, 5, 6),
    (2, 4, 0, 6),
    (2, 4, 5, 0),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Sums in another order. The interpreter rounds to bfloat16 towards zero.
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
# Tensor cores cut off what does not fit into float32.
SQUARES = {"cpu": 2e-5, "cuda": 2e-4}


def operands(samples: int, m: int, tokens: int, n: int, dtype=torch.float32):
    return torch.randn(samples, m, tokens).to(dtype), torch.randn(samples, tokens, n).to(dtype)


def layouts(left: torch.Tensor, right: torch.Tensor):
    """The same numbers, side by side in different ways."""
    yield left, right
    yield _dense(left, (0, 2, 1)), right  # as a linear layer has them: [B·T, m] and [B·T, n]
    yield _dense(left, (2, 0, 1)), _dense(right, (1, 0, 2))  # [T, B, ...]
    yield _dense(left, (0, 2, 1)), _dense(right, (0, 2, 1))
    yield _padded(left), _padded(right)
    yield _dense(left, (2, 1, 0)), _dense(right, (2, 1, 0))  # samples side by side
    # Not at a multiple of 16 bytes.
    yield torch.cat([left.new_zeros(1), left.flatten()])[1:].view(left.shape), right


def _dense(x: torch.Tensor, order: tuple[int, int, int]) -> torch.Tensor:
    """Lay out dims in this order."""
    back = [order.index(dim) for dim in range(3)]
    return x.permute(order).contiguous().permute(back)


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Let rows of 32 numbers more than needed end in NaN."""
    width = -(-x.shape[2] // 32) * 32 + 32
    rows = x.new_full((x.shape[0], x.shape[1], width), float("nan"))
    rows[:, :, : x.shape[2]] = x
    return rows[:, :, : x.shape[2]]


def _moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """Copy to the device: strides, what lies between, and the address up to 16 bytes."""
    if device == "cpu":
        return x
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    flat = x.as_strided((max(0, last + 1) if x.numel() else 0,), (1,))
    offset = x.data_ptr() % 16 // x.element_size()
    memory = torch.zeros(offset + flat.numel(), dtype=x.dtype, device=device)
    memory[offset:] = flat
    return memory.as_strided(x.shape, x.stride(), offset)


@contextlib.contextmanager
def poisoned():
    """Fill new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def splits_that_cost_nothing():
    """Split the tokens of small operands too."""
    with mock.patch.object(tiling, "SPLIT_TOKENS", 0):
        count_splits.cache_clear()
        yield
    count_splits.cache_clear()


def compare(flash, materialize, left, right, out_dtype, device) -> None:
    expected, bias = reference.flash_norm(left, right, True)
    products, _ = reference.materialize_norm(left, right, out_dtype)
    moved = _moved(left, device), _moved(right, device)
    squares, bias_squares = flash(*moved, True)
    assert (squares.dtype, bias_squares.dtype) == (torch.float32, torch.float32)
    close(squares, expected, SQUARES[device])
    close(bias_squares, bias, SQUARES[device])
    samples, squares = materialize(*moved, out_dtype)
    assert (samples.dtype, samples.is_contiguous()) == (out_dtype, True)
    close(samples, products, ROUNDING[out_dtype])
    # The norm is that of the numbers returned.
    close(squares, samples.float().square().sum((1, 2)), 2e-6)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    scale = expected.float().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        found.float().cpu(), expected.float().cpu(), rtol=tolerance, atol=tolerance * scale
    )


def alone(materialize_norms):
    """One layer's products and norms."""

    def materialize(left, right, out_dtype):
        (products,), squares = materialize_norms([left], [right], out_dtype)
        return products, squares

    return materialize


def check_layers(materialize_norms, device: str) -> None:
    """Layers of one call, alike or not, more than a launch takes: norms of all together."""
    torch.manual_seed(0)
    for samples, out_dtype in ((4, torch.bfloat16), (1, torch.bfloat16), (3, torch.float32)):
        layers = []
        for k in range(21):
            m, n, tokens = 24 + 40 * (k % 3), 16 + 64 * (k % 4) + (k == 5), 20 + 30 * (k % 2)
            left, right = operands(samples, m, tokens, n, torch.bfloat16)
            if k % 5 < 3:
                left = _dense(left, (0, 2, 1))
            layers.append((_moved(left, device), _moved(right, device)))
        layers.append((left[:, :0], right))
        lefts, rights = map(list, zip(*layers, strict=True))
        with poisoned():
            found, squares = materialize_norms(lefts, rights, out_dtype)
        expected = torch.zeros(samples)
        for (left, right), products in zip(layers, found, strict=True):
            exact, _ = reference.materialize_norm(left, right, out_dtype)
            assert (products.dtype, products.is_contiguous()) == (out_dtype, True)
            close(products, exact, ROUNDING[out_dtype])
            expected += products.float().square().sum((1, 2)).cpu()
        close(squares, expected, 2e-6)


def check_shapes(flash, materialize, device: str) -> None:
    """Compare implementations with the specification."""
    torch.manual_seed(0)
    with poisoned():
        for shape in SHAPES:
            left, right = operands(*shape, dtype=torch.float16)
            compare(flash, materialize, left, right, torch.float16, device)
            alone, none = flash(_moved(left, device), _moved(right, device), False)
            close(alone, reference.flash_norm(left, right, False)[0], SQUARES[device])
            assert (none.dtype, none.shape) == (torch.float32, (0,))


def check_layouts(flash, materialize, device: str) -> None:
    """The same for all dtypes and ways to lie in memory."""
    torch.manual_seed(0)
    with poisoned():
        for dtype, out_dtype in zip(DTYPES, (*DTYPES[1:], DTYPES[0]), strict=True):
            compare(flash, materialize, *operands(2, 40, 37, 48, dtype), out_dtype, device)
        for dtype, shape in (
            (torch.bfloat16, (3, 24, 40, 16)),
            (torch.float16, (1, 16, 8, 1)),
            (torch.float32, (2, 20, 24, 18)),
        ):
            for left, right in layouts(*operands(*shape, dtype)):
                compare(flash, materialize, left, right, dtype, device)
        # Operands that repeat themselves.
        left, right = torch.randn(1, 24, 1), torch.randn(3, 8, 16)
        compare(flash, materialize, left.expand(3, 24, 8), right, torch.float32, device)


def check_not_finite(flash, materialize, device: str) -> None:
    """What is in a sample, and around it, changes no other's norm."""
    for tokens in (5, 70):
        left, right = (_dense(x, (0, 2, 1)) for x in operands(3, 24, tokens, 40, torch.bfloat16))
        moved = _moved(left, device), _moved(right, device)
        expected = [*flash(*moved, True), *materialize(*moved, torch.float32)]
        for operand, place, value in (
            (0, (1, 3, 0), float("inf")),
            (0, (1, 23, tokens - 1), float("nan")),
            (1, (1, 0, 7), float("nan")),
            (1, (1, tokens - 1, 39), float("inf")),
        ):
            moved[operand][place], before = value, moved[operand][place].clone()
            found = [*flash(*moved, True), *materialize(*moved, torch.float32)]
            moved[operand][place] = before
            assert not found[0][1].isfinite()
            assert found[1][1].isfinite() == (operand == 1)
            assert not found[3][1].isfinite()
            for x, unchanged in zip(found, expected, strict=True):
                torch.testing.assert_close(x[::2], unchanged[::2], rtol=0, atol=0)


def check_kernel(device: str) -> None:
    from flashnorm_compile.kernels.flash_norm import launch

    with splits_that_cost_nothing():
        check_shapes(launch.flash_norm, alone(launch.materialize_norms), device)
        check_layouts(launch.flash_norm, alone(launch.materialize_norms), device)
        check_not_finite(launch.flash_norm, alone(launch.materialize_norms), device)
        check_layers(launch.materialize_norms, device)


def check_pointers(device: str) -> None:
    """The same without tensor descriptors."""
    from flashnorm_compile.kernels.flash_norm import launch

    known = launch.find_device(torch.device(device))
    without = dataclasses.replace(known, descriptors=False, hopper=False)
    with mock.patch.object(launch, "find_device", return_value=without), splits_that_cost_nothing():
        check_shapes(launch.flash_norm, alone(launch.materialize_norms), device)
        check_not_finite(launch.flash_norm, alone(launch.materialize_norms), device)
        check_layers(launch.materialize_norms, device)


def test_the_ops_on_the_cpu_equal_the_reference(monkeypatch):
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", 2000)
    check_shapes(flash_norm, materialize_norm, "cpu")
    check_layouts(flash_norm, materialize_norm, "cpu")
    check_not_finite(flash_norm, materialize_norm, "cpu")
    check_layers(materialize_norms, "cpu")


@needs_triton
def test_kernel_equals_reference_in_the_interpreter():
    run_interpreted("import test_flash_norm_kernel as t; t.check_kernel('cpu')")


@needs_triton
def test_kernel_without_descriptors_equals_reference_in_the_interpreter():
    run_interpreted("import test_flash_norm_kernel as t; t.check_pointers('cpu')")


class Driver:
    """What Triton asks of the driver of an H100 before it launches anything."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def check_code() -> None:
    """Compile for an H100 that is not there."""
    import triton

    from flashnorm_compile.kernels.flash_norm import kernel, launch

    triton.runtime.driver.set_active(Driver())
    launch.find_device = lambda _: launch.Device(132, 232448, descriptors=True, hopper=True)
    compiled = []

    class Compiled:
        def __init__(self, function) -> None:
            self.function = function

        def __getitem__(self, grid):
            return lambda *arguments, **constants: compiled.append(
                self.function.warmup(*arguments, grid=grid, **constants)
            )

    kernel.products_kernel = Compiled(kernel.products_kernel)
    kernel.add_parts_kernel = Compiled(kernel.add_parts_kernel)
    kernel.sites_kernel = Compiled(kernel.sites_kernel)

    def code(call, samples: int, m: int, tokens: int, n: int, *arguments):
        compiled.clear()
        left = torch.empty(samples, tokens, m, dtype=torch.bfloat16).transpose(1, 2)
        call(left, torch.empty(samples, tokens, n, dtype=torch.bfloat16), *arguments)
        assert compiled[0].metadata.shared <= 232448
        return compiled[0]

    flash = code(launch.flash_norm, 40, 768, 64, 768, True)
    for other in (1, 2, 16, 41):
        assert code(launch.flash_norm, other, 768, 64, 768, True) is flash
    materialize = code(alone(launch.materialize_norms), 40, 768, 64, 768, torch.bfloat16)

    def three(left, right, out_dtype):
        return launch.materialize_norms([left] * 3, [right] * 3, out_dtype)

    together = code(three, 40, 768, 64, 768, torch.bfloat16)
    assert code(three, 41, 768, 64, 768, torch.bfloat16) is together
    split = code(launch.flash_norm, 1, 768, 4096, 768, False)
    assert len(compiled) == 2
    for each in (flash, materialize, together, split):
        text = each.asm["ptx"]
        assert "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16" in text
        assert "cp.async.bulk.tensor.3d.shared::cluster.global" in text
        assert "mma.sync" not in text
        # A product goes on while the next is prepared.
        assert "wgmma.wait_group.sync.aligned 1" in text
        assert "st.local" not in text
    for each in (materialize, together):
        assert "cp.async.bulk.tensor.3d.global.shared::cta" in each.asm["ptx"]


@needs_triton
def test_code_for_an_h100_uses_what_it_has_and_serves_all_batch_sizes():
    result = subprocess.run(
        [sys.executable, "-c", "import test_flash_norm_kernel as t; t.check_code()"],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@needs_gpu
def test_kernel_equals_reference_on_the_gpu():
    check_kernel("cuda")
    check_pointers("cuda")
    for shape in ((4, 768, 197, 2304), (1, 768, 5000, 770), (3, 1000, 64, 768)):
        for dtype in (torch.bfloat16, torch.float32):
            left, right = operands(*shape, dtype)
            compare(flash_norm, materialize_norm, _dense(left, (0, 2, 1)), right, dtype, "cuda")


@needs_gpu
def test_results_repeat_bit_by_bit_on_the_gpu():
    for shape in ((40, 768, 256, 768), (1, 768, 8192, 768)):
        left, right = (x.cuda() for x in operands(*shape, torch.bfloat16))
        first = [*flash_norm(left, right, True), *materialize_norm(left, right, torch.bfloat16)]
        second = [*flash_norm(left, right, True), *materialize_norm(left, right, torch.bfloat16)]
        for x, y in zip(first, second, strict=True):
            assert torch.equal(x, y)


@needs_gpu
def test_tf32_is_used_where_it_is_allowed():
    left, right = (x.cuda() for x in operands(4, 256, 512, 256))
    before = torch.get_float32_matmul_precision()
    exact = flash_norm(left, right)[0]
    try:
        torch.set_float32_matmul_precision("high")
        assert not torch.equal(flash_norm(left, right)[0], exact)
        torch.testing.assert_close(flash_norm(left, right)[0], exact, rtol=1e-3, atol=0)
    finally:
        torch.set_float32_matmul_precision(before)


@needs_gpu
def test_the_kernels_do_not_synchronise():
    for shape in ((8, 64, 40, 48), (1, 64, 4096, 48)):
        left, right = (x.cuda() for x in operands(*shape, torch.bfloat16))

        def call(left=left, right=right) -> list[torch.Tensor]:
            squares = flash_norm(left, right, True)
            return [*squares, *materialize_norm(left, right, torch.bfloat16)]

        expected = call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        graph.replay()
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def test_the_ops_are_sound_custom_ops():
    left, right = operands(3, 4, 5, 6, torch.bfloat16)
    torch.library.opcheck(flash_norm, (left.transpose(1, 2).contiguous().transpose(1, 2), right))
    torch.library.opcheck(flash_norm, (left, right, True))
    torch.library.opcheck(materialize_norms, ([left] * 2, [right] * 2, torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": torch.ones(3, 2)}, r"left is torch.float32, 2-d; expected \[B, m, T\] of bfl"),
        ({"left": torch.ones(3, 2, 4, dtype=torch.float64)}, "left is torch.float64, 3-d; expect"),
        ({"right": torch.ones(3, 4, 5, 1)}, r"right is torch.float32, 4-d; expected \[B, T, n\]"),
        ({"right": torch.ones(3, 4, 5).half()},
         "left is torch.float32 and right is torch.float16; expected one dtype"),
        ({"right": torch.ones(3, 4, 5, device="meta")}, "left is on cpu and right on meta; exp"),
        ({"right": torch.ones(2, 4, 5)}, r"left holds 3 samples and right 2; expected left \[B"),
        ({"right": torch.ones(3, 6, 5)}, r"left holds 4 tokens and right 6; expected left \[B"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_what_was_found_and_what_is_valid(change, message):
    arguments = {"left": torch.ones(3, 2, 4), "right": torch.ones(3, 4, 5)} | change
    with pytest.raises(ValueError, match="flash_norm: " + message):
        flash_norm(**arguments)
    with pytest.raises(ValueError, match="materialize_norms: " + message):
        materialize_norm(**arguments, out_dtype=torch.float32)


def test_layers_of_one_call_must_fit_each_other():
    left, right = torch.ones(3, 2, 4), torch.ones(3, 4, 5)
    with pytest.raises(ValueError, match=r"2 lefts and 1 rights; expected the same number of each"):
        materialize_norms([left, left], [right], torch.float32)
    with pytest.raises(ValueError, match=r"0 lefts and 0 rights"):
        materialize_norms([], [], torch.float32)
    message = r"lefts\[1\] holds 1 samples on cpu and lefts\[0\] 3 on cpu; expected the same"
    with pytest.raises(ValueError, match=message):
        materialize_norms([left, left[:1]], [right, right[:1]], torch.float32)


def test_products_are_rounded_to_real_numbers_only():
    message = "materialize_norms: out_dtype is torch.int32; expected bfloat16, float16 or float32"
    with pytest.raises(ValueError, match=message):
        materialize_norm(torch.ones(3, 2, 4), torch.ones(3, 4, 5), torch.int32)


def test_tokens_are_split_only_where_there_are_too_few_tiles():
    for m, n, tokens, samples in ((768, 768, 16384, 1), (768, 3072, 16384, 1), (64, 64, 4096, 3)):
        tile = choose_tile(m, n, tokens, torch.bfloat16, True)
        tiles = samples * -(-m // tile.m) * -(-n // tile.n)
        splits = count_splits(tiles, tokens, tile, 132)
        steps = -(-tokens // tile.tokens)
        assert splits > 1
        assert 90 < tiles * splits <= 4 * 132
        # None is empty.
        assert (splits - 1) * -(-steps // splits) < steps
        assert count_splits(tiles * 132, tokens, tile, 132) == 1
        assert count_splits(tiles, tile.tokens, tile, 132) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("descriptors", [True, False])
def test_every_tile_has_room_for_two_steps(dtype, descriptors):
    for m in (1, 40, 100, 200, 768):
        for n in (1, 20, 40, 100, 200, 768):
            for tokens in (8, 197, 1024):
                tile = choose_tile(m, n, tokens, dtype, descriptors)
                for out_dtype in (None, *DTYPES):
                    assert count_stages(tile, dtype, out_dtype, 232448) >= 2
                    if not descriptors:
                        assert count_stages(tile, dtype, out_dtype, 101376) >= 2
