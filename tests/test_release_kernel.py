"""flashnorm::release: weighted sums over samples with noise, and its kernels."""

from __future__ import annotations

import importlib.util
from unittest import mock

import pytest
import torch
from interpreter import run_interpreted

from flashnorm_compile.kernels.noise import cpu
from flashnorm_compile.kernels.release import reference
from flashnorm_compile.kernels.release.op import release

KEY = torch.tensor([-1234567890123, 2**40 + 3])
SCALARS = torch.tensor([1.0, 0.7, 0.3])
NO_NOISE = torch.tensor([1.0, 0.0, 0.3])

SHAPES = [(), (0,), (1,), (3, 0), (1023,), (1025,), (7, 5, 9), (37, 141)]
BATCH_SIZES = [0, 1, 3, 8, 9, 65]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]
# Sums of up to 65 float32 terms in another order; half precision rounds the result once.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def weights_for(batch_size: int) -> torch.Tensor:
    """Some samples are left out."""
    return torch.rand(batch_size) * (torch.arange(batch_size) % 3 != 1)


def layouts(samples: torch.Tensor):
    """Samples that lie together, apart, and across each other."""
    yield samples
    yield samples.repeat_interleave(2, dim=0)[::2]
    if samples.dim() > 1:
        padded = torch.cat([samples, samples], dim=1)
        yield padded[:, : samples.shape[1]]
        yield samples.transpose(0, -1).contiguous().transpose(0, -1)


def compare(run, samples, weights, scalars, stream, dtype, device) -> None:
    expected = [
        reference.release(x, weights, KEY, scalars, stream + k, dtype)
        for k, x in enumerate(samples)
    ]
    moved = [tensor.to(device) for tensor in (weights, KEY, scalars)]
    # Not x.to(device) alone: a copy to the GPU may lose the strides.
    found = run([_moved(x, device) for x in samples], *moved, stream, dtype)
    for out, right in zip(found, expected, strict=True):
        assert (out.dtype, out.is_contiguous()) == (dtype, True)
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(out.cpu(), right, atol=tolerance, rtol=tolerance)


def _moved(x: torch.Tensor, device: str) -> torch.Tensor:
    if device == "cpu":
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def check(run, device: str) -> None:
    """Compare an implementation with the specification."""
    torch.manual_seed(0)
    for shape in SHAPES:
        samples = torch.randn(9, *shape)
        for x in layouts(samples):
            compare(run, [x], weights_for(9), SCALARS, 0, torch.float32, device)
        compare(run, [samples], weights_for(9), NO_NOISE, 1, torch.float32, device)
    for batch_size in BATCH_SIZES:
        several = [torch.randn(batch_size, *shape) for shape in ((37, 5), (3,), ())]
        compare(run, several, weights_for(batch_size), SCALARS, 16, torch.float32, device)
    for dtype, out_dtype in DTYPES:
        samples = torch.randn(9, 41, 37).to(dtype)
        compare(run, [samples], weights_for(9), SCALARS, 2**20 - 2, out_dtype, device)


def check_left_out(run, device: str) -> None:
    """A sample of weight 0 may hold anything."""
    weights = torch.tensor([1.0, 0.0, 1.0])
    samples = torch.ones(3, 1000)
    samples[1] = float("nan")
    samples[1, ::2] = float("inf")
    compare(run, [samples], weights, SCALARS, 0, torch.float32, device)


def check_many(run, device: str) -> None:
    """Tensors that share launches: each its own samples, strides, dtype and stream."""
    for rows in (1, 13):
        samples = []
        for k in range(80):
            numel = (0, 1, 3, 16, 257, 1024)[k % 6]
            x = torch.randn(rows, numel + k % 5 // 4)[:, k % 5 // 4 :]
            samples.append(x.bfloat16() if k % 4 == 3 else x.double() if k % 20 == 2 else x)
        # More than one program; the last of them ends within a step.
        samples.insert(20, torch.randn(rows, 20_001 if rows == 1 else 2_503))
        samples.insert(5, torch.randn(rows, 20_004 if rows == 1 else 2_504))
        compare(run, samples, torch.rand(rows), SCALARS, 100, torch.float32, device)
    compare(run, [], torch.rand(3), SCALARS, 0, torch.float32, device)


def check_large(run, device: str) -> None:
    """Tensors of which a program makes many steps, beside others."""
    for rows, numel in ((1, 40_001), (9, 10_004)):
        samples = [torch.randn(rows, size) for size in (numel, 999, numel)]
        compare(run, samples, torch.rand(rows), SCALARS, 7, torch.float32, device)


def check_one_left_out(run, device: str) -> None:
    """A batch of one sample of weight 0 is all noise."""
    for numel in (1024, 1000):
        samples = torch.full((1, numel), float("nan"))
        compare(run, [samples], torch.zeros(1), SCALARS, 0, torch.float32, device)


def check_kernel(device: str) -> None:
    from flashnorm_compile.kernels.release import launch

    check(launch.release, device)
    check_left_out(launch.release, device)
    check_many(launch.release, device)
    check_one_left_out(launch.release, device)
    with mock.patch.object(launch, "LARGE", 1000):
        check_large(launch.release, device)


def test_the_op_on_the_cpu_equals_the_reference():
    check(release, "cpu")
    check_left_out(release, "cpu")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernel_equals_reference_in_the_interpreter():
    run_interpreted("import test_release_kernel as t; t.check_kernel('cpu')")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_is_compiled_for_no_particular_integers():
    from triton.backends.compiler import BaseBackend
    from triton.runtime.jit import native_specialize_impl

    from flashnorm_compile.kernels.records import encode

    values = [0, 1, 2, 16, 768, 2**31 - 1, 2**31, 2**32, 2**46, 0x7F0123456780]
    codes = tuple(map(encode, values))
    types, attributes = native_specialize_impl(BaseBackend, codes, False, True, True)
    assert set(types) == {"i64"}
    assert set(attributes) == {""}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_equals_reference_on_the_gpu():
    check_kernel("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_other_rows_and_sizes_launch_the_kernel_that_is_there():
    from flashnorm_compile.kernels.release import kernel, launch

    def call(rows: int, numel: int) -> None:
        samples = [torch.zeros(rows, size, device="cuda") for size in (numel, 16, 4)]
        moved = [tensor.cuda() for tensor in (torch.ones(rows), KEY, SCALARS)]
        launch.release(samples, *moved, 0, torch.float32)

    def compiled() -> int:
        return sum(len(caches[0]) for caches in kernel.release_kernel.device_caches.values())

    call(2, 4)
    before = compiled()
    for rows, numel in ((3, 4), (16, 64), (17, 2**20)):
        call(rows, numel)
    assert compiled() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_does_not_synchronise():
    samples = [torch.randn(5, 300, device="cuda"), torch.randn(5, 7, device="cuda")]
    arguments = (samples, *(t.cuda() for t in (torch.ones(5), KEY, SCALARS)), 0, torch.float32)
    release(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        release(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_op_is_a_sound_custom_op():
    samples = [torch.randn(3, 4), torch.randn(3, 2, 2)]
    arguments = (samples, torch.rand(3), KEY, SCALARS, 5, torch.float32)
    torch.library.opcheck(release, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(3, dtype=torch.float64)},
         r"weights is torch.float64 \[3\]; expected torch.float32 \[B\]"),
        ({"weights": torch.ones(3, 1)}, r"weights is torch.float32 \[3, 1\]"),
        ({"weights": torch.ones(4)}, r"samples\[0\] holds 3 samples; expected 4, one per weight"),
        ({"key": torch.ones(2)}, r"key is torch.float32 \[2\]; expected torch.int64 \[2\]"),
        ({"scalars": torch.ones(2)}, r"scalars is .* expected torch.float32 \[3\]"),
        ({"first_stream": 2**20}, r"1 streams from 1048576; expected 0 <= stream < 2\*\*20"),
        ({"first_stream": -1}, "1 streams from -1; expected 0 <= stream"),
        ({"samples": [torch.ones(3, dtype=torch.int64)]}, r"samples\[0\] is torch.int64, 1-d"),
        ({"samples": [torch.tensor(1.0)]}, r"samples\[0\] is torch.float32, 0-d; expected"),
        ({"samples": [torch.ones(3, device="meta")]}, r"samples\[0\] is on meta and weights on"),
    ],
)
def test_errors_name_the_argument_what_was_found_and_what_is_valid(change, message):
    valid = {
        "samples": [torch.ones(3, 2)],
        "weights": torch.ones(3),
        "key": KEY,
        "scalars": SCALARS,
        "first_stream": 0,
        "out_dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        release(**(valid | change))


@pytest.mark.parametrize("chunk_blocks", [1, 5, 2**16])
def test_tensors_that_share_the_making_of_their_noise(chunk_blocks, monkeypatch):
    """On the CPU: bit by bit what each gets alone, wherever a chunk ends."""
    monkeypatch.setattr(cpu, "CHUNK_BLOCKS", chunk_blocks)
    samples = [torch.randn(3, *shape) for shape in ((), (5,), (0,), (4, 4), (37,), (1,), (2, 3))]
    weights = torch.rand(3)
    found = release(samples, weights, KEY, SCALARS, 9, torch.float32)
    for k, (x, out) in enumerate(zip(samples, found, strict=True)):
        alone = reference.release(x, weights, KEY, SCALARS, 9 + k, torch.float32)
        torch.testing.assert_close(out, alone, rtol=0, atol=0)
