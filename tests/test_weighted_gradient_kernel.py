"""flashnorm::weighted_gradients: sums of weighted products over samples, and its kernel."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib

import pytest
import torch
from interpreter import run_interpreted

from flashnorm_compile.kernels.division import cdiv
from flashnorm_compile.kernels.weighted_gradient import op, reference, tiling
from flashnorm_compile.kernels.weighted_gradient.op import weighted_gradient, weighted_gradients

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# B, m, T, n
SHAPES = [
    (1, 1, 1, 1), (3, 8, 1, 24), (2, 24, 16, 8), (5, 20, 7, 33), (4, 40, 35, 17), (1, 16, 50, 40),
    (37, 5, 3, 9),
]  # fmt: skip
EMPTY = [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Small ones, so that there are several; the last is a GPU's.
TILES = [
    tiling.Tile(16, 16, 16, 4, 2, 1, 1.0, 0),
    tiling.Tile(16, 32, 32, 4, 3, 1, 1.0, 0),
    tiling.SMALL_TILES[0],
]
# Of ‖found - expected‖/‖expected‖: products are exact or float32's, and so are sums and weights.
TOLERANCE = 3e-6


def operands(shape, dtype):
    B, m, T, n = shape
    return torch.randn(B, m, T).to(dtype), torch.randn(B, T, n).to(dtype)


def weights_for(batch_size: int) -> torch.Tensor:
    """Of many sizes; some samples are left out, most often the first and the last."""
    sizes = torch.rand(batch_size) * 10.0 ** torch.randint(-6, 2, (batch_size,))
    return sizes * (torch.arange(batch_size) % 3 != 0)


def layouts(x: torch.Tensor):
    """[B, T, width] as operands are laid out: by sample, by token, transposed, and with gaps."""
    B, T, width = x.shape
    yield x.contiguous()
    yield x.mT.contiguous().mT
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    padded = x.new_full((B, T + 3, -(-width // 8) * 8 + 16), float("nan"))
    for place in (8, 3):
        padded[:, 2 : T + 2, place : place + width] = x
        yield padded[:, 2 : T + 2, place : place + width]
        padded.fill_(float("nan"))
    yield x[:1].expand(B, T, width)


def compare(run, left, right, weights, device, tolerance=TOLERANCE) -> None:
    """Hold a result against float64's."""
    expected = reference.weighted_gradient(left.double(), right.double(), weights)
    found = run(_moved(left, device), _moved(right, device), weights.to(device))
    assert (found.shape, found.is_contiguous()) == (expected.shape, True)
    assert found.dtype == reference.result_dtype(left)
    error = (found.cpu().double() - expected).norm()
    assert error <= tolerance * expected.norm(), (left.shape, left.stride(), right.stride())


def _moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """Copy with the strides: those of a plain copy may differ, and the fresh gaps hold NaN."""
    if device == "cpu":
        return x
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    storage = torch.full((max(0, span),), float("nan"), dtype=x.dtype, device=device)
    storage = storage.as_strided(x.shape, x.stride())
    return x.to(device) if 0 in x.stride() else storage.copy_(x)


def check_shapes(run, device: str) -> None:
    for shape in SHAPES + EMPTY:
        for dtype in DTYPES:
            compare(run, *operands(shape, dtype), weights_for(shape[0]), device)


def check_layouts(run, device: str) -> None:
    for dtype, shape in ((torch.bfloat16, (3, 24, 40, 16)), (torch.float32, (2, 8, 5, 20))):
        left, right = operands(shape, dtype)
        weights = torch.tensor([0.7, 0.0, 1.3])[: shape[0]]
        for x in layouts(left.mT):
            compare(run, x.mT, right, weights, device)
        for x in layouts(right):
            compare(run, left.mT.contiguous().mT, x, weights, device)


def check_left_out(run, device: str) -> None:
    """A sample of weight 0 may hold anything, wherever it stands."""
    for missing in ([0], [1], [4], [0, 1, 3, 4], [0, 1, 2, 3, 4]):
        left, right = operands((5, 24, 40, 16), torch.bfloat16)
        weights = torch.rand(5) + 0.1
        left[missing], right[missing] = float("nan"), float("inf")
        weights[missing] = 0.0
        compare(run, left, right, weights, device)
        compare(run, left.mT.contiguous().mT, right, weights, device)


def check_weights(run, device: str) -> None:
    """What is added of a sample is its weight times its product, whatever is added later.

    Every place of the result comes from one sample, so that the rounding of sums averages out.
    """
    B = 100
    left = torch.eye(B).bfloat16().unsqueeze(2)
    right = torch.randn(B, 1, 64).bfloat16()
    # Triton's quotient on a GPU may be off by 2**-22.
    tolerance = 2.0**-21 if device == "cuda" else 2.0**-22
    for weights in (
        torch.rand(B) + 0.01,
        10.0 ** torch.empty(B).uniform_(-15, 3),
        torch.randn(B),
        -torch.rand(B) * (torch.arange(B) % 7 == 3),
    ):
        found = run(left.to(device), right.to(device), weights.to(device)).cpu().double()
        values = right[:, 0].double()
        found = (found * values).sum(1) / values.square().sum(1)
        assert ((found - weights).abs() <= tolerance * weights.abs()).all()


def check(run, device: str) -> None:
    """Hold an implementation against the specification."""
    torch.manual_seed(0)
    check_shapes(run, device)
    check_layouts(run, device)
    check_left_out(run, device)


def check_many(run, device: str) -> None:
    """Layers that share launches, and some that do not: each its own sizes, strides and dtype."""
    lefts, rights, weights = [], [], torch.tensor([0.3, 0.0, 1.7])
    sizes = [(8 * k, 5, 12 * k) for k in range(1, 10)] + [(130, 5, 8), (3, 5, 7), (0, 5, 4)] * 2
    for k, size in enumerate(sizes):
        left, right = operands((3, *size), torch.float32 if k > 12 else torch.bfloat16)
        lefts.append(left.mT.contiguous().mT)
        rights.append(right)
    for x in (*lefts, *rights):
        x[1] = float("nan")
    found = run(*([_moved(x, device) for x in xs] for xs in (lefts, rights)), weights.to(device))
    for left, right, out in zip(lefts, rights, found, strict=True):
        compare(lambda *_, out=out: out, left, right, weights, device)
    assert run([], [], weights.to(device)) == []


def check_kernel(device: str) -> None:
    """Check the ways in which the kernel may be run."""
    from flashnorm_compile.kernels.weighted_gradient import launch

    known = launch.find_device(torch.device(device))

    def run(left, right, weights, tile=None, splits=None, descriptors=True):
        device = dataclasses.replace(known, descriptors=descriptors, hopper=descriptors)
        site = launch.describe_site(left, right, device)
        way = launch.choose_way(*site, device)
        way = dataclasses.replace(way, tile=tile or way.tile)
        way = dataclasses.replace(way, steps=cdiv(left.shape[2], way.tile.tokens))
        return launch.launch([site], weights, way, device, splits)[0]

    check(lambda left, right, *x: launch.weighted_gradients([left], [right], *x)[0], device)
    check_many(launch.weighted_gradients, device)
    check_weights(functools.partial(run, tile=TILES[-1], splits=1), device)
    for tile, (splits, descriptors) in itertools.product(TILES, ((1, False), (3, True))):
        for dtype, n in ((torch.bfloat16, 16), (torch.float32, 17)):
            left, right = operands((4, 24, 35, n), dtype)
            way = functools.partial(run, tile=tile, splits=splits, descriptors=descriptors)
            compare(way, left.mT.contiguous().mT, right, weights_for(4), device)


def test_the_op_on_the_cpu_equals_the_reference(monkeypatch):
    check(weighted_gradient, "cpu")
    check_weights(weighted_gradient, "cpu")
    check_many(weighted_gradients, "cpu")
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", 1000)
    check(weighted_gradient, "cpu")


def test_float64_stays_float64():
    left, right = operands((3, 5, 4, 6), torch.float64)
    compare(weighted_gradient, left, right, torch.rand(3), "cpu", tolerance=1e-14)


@needs_triton
def test_kernel_equals_reference_in_the_interpreter():
    run_interpreted("import test_weighted_gradient_kernel as t; t.check_kernel('cpu')")


@needs_gpu
def test_kernel_equals_reference_on_the_gpu():
    check_kernel("cuda")


@needs_gpu
def test_float32_may_be_multiplied_as_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    left, right = operands((5, 200, 30, 300), torch.float32)
    compare(weighted_gradient, left, right, torch.rand(5), "cuda", tolerance=2e-3)


@needs_gpu
def test_other_batches_launch_the_kernel_that_is_there():
    from flashnorm_compile.kernels.weighted_gradient import kernel

    def call(samples: int) -> None:
        left, right = torch.zeros(2, samples, 64, 64, device="cuda", dtype=torch.bfloat16)
        weighted_gradient(left.mT, right, torch.ones(samples, device="cuda"))

    def compiled() -> int:
        caches = kernel.weighted_gradients_kernel.device_caches.values()
        return sum(len(cache[0]) for cache in caches)

    call(2)
    before = compiled()
    for samples in (1, 3, 16, 1000):
        call(samples)
    assert compiled() == before


@needs_gpu
def test_the_kernel_does_not_synchronise():
    left, right = (x.cuda() for x in operands((5, 200, 30, 300), torch.bfloat16))
    weights = torch.ones(5, device="cuda")
    weighted_gradient(left, right, weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        weighted_gradient(left, right, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_the_kernel_repeats_bit_by_bit():
    left, right = (x.cuda() for x in operands((40, 300, 50, 200), torch.bfloat16))
    weights = weights_for(40).cuda()
    first = weighted_gradient(left, right, weights)
    assert all(torch.equal(weighted_gradient(left, right, weights), first) for _ in range(20))


def test_the_op_is_a_sound_custom_op():
    left, right = operands((3, 4, 5, 6), torch.float32)
    torch.library.opcheck(weighted_gradients, ([left, left], [right, right], torch.rand(3)))
    torch.library.opcheck(weighted_gradient, (left, right, torch.rand(3)))


def test_sizes_may_be_symbolic():
    def step(left, right, weights):
        return weighted_gradient(left.mT, right, weights).sum()

    compiled = torch.compile(step, backend="eager", dynamic=True, fullgraph=True)
    for B, T in ((3, 4), (5, 6)):
        arguments = (torch.randn(B, T, 4), torch.randn(B, T, 8), torch.rand(B))
        torch.testing.assert_close(compiled(*arguments), step(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lefts": []}, "0 lefts and 1 rights; expected pairs"),
        ({"lefts": [torch.ones(3, 4)]}, r"lefts\[0\] is torch.float32, 2-d; expected \[B, m, T\]"),
        ({"rights": [torch.ones(3, 5, 6).int()]}, r"rights\[0\] is torch.int32, 3-d; expected"),
        ({"rights": [torch.ones(3, 5, 6).double()]},
         r"lefts\[0\] is torch.float32 and rights\[0\] torch.float64; expected one dtype"),
        ({"weights": torch.ones(3).double()},
         r"weights is torch.float64 \[3\]; expected torch.float32 \[B\]"),
        ({"weights": torch.ones(3, 1)}, r"weights is torch.float32 \[3, 1\]; expected"),
        ({"weights": torch.ones(2)}, r"lefts\[0\] holds 3 samples and weights 2; expected"),
        ({"rights": [torch.ones(2, 5, 6)]}, r"holds 3 samples and rights\[0\] 2; expected"),
        ({"rights": [torch.ones(3, 4, 6)]}, r"holds 5 tokens and rights\[0\] 4; expected"),
        ({"rights": [torch.ones(3, 5, 6, device="meta")]}, r"rights\[0\] is on meta and weights"),
    ],
)
def test_errors_name_the_argument_what_was_found_and_what_is_valid(change, message):
    valid = {"lefts": [torch.ones(3, 4, 5)], "rights": [torch.ones(3, 5, 6)]}
    with pytest.raises(ValueError, match=message):
        weighted_gradients(**({"weights": torch.ones(3)} | valid | change))


def test_the_benchmark_checks_what_it_times(monkeypatch, tmp_path):
    folder = pathlib.Path(__file__).parents[1] / "benchmarks" / "kernels"
    monkeypatch.syspath_prepend(str(folder))
    import weighted_gradient as benchmark

    arguments = ["--smoke", "--output", str(tmp_path / "rows.json")]
    benchmark.main(arguments)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows
    assert all(row["kernel_ms"] > 0 for row in rows)
    monkeypatch.setattr(benchmark, "kernel", lambda pairs, _: [benchmark.mm(*x) for x in pairs])
    with pytest.raises(SystemExit, match="kernel is wrong: relative error"):
        benchmark.main(arguments)
