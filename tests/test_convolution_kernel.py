"""flashnorm::convolution_*: gradients of a convolution's weight by sample, and their kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

import pytest
import torch
from interpreter import run_interpreted
from torch.nn import functional

from flashnorm_compile.kernels.convolution import (
    convolution_norm,
    convolution_samples,
    convolution_weighted,
    reference,
)

OPS = convolution_samples, convolution_norm, convolution_weighted
HALF = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A convolution. ``fewer``: positions that its gradient lacks, as if it were transposed."""

    batch: int = 2
    outer: int = 16
    inner: int = 16
    size: tuple[int, int] = (6, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    fewer: tuple[int, int] = (0, 0)
    dtype: torch.dtype = HALF
    layout: str = "channels_last"

    @property
    def geometry(self):
        pairs = (self.kernel, self.stride, self.padding, self.dilation)
        return (*map(list, pairs), self.groups)

    def operands(self):
        """Values that the dtype holds, so that only sums round."""
        positions = [
            (self.size[d] + 2 * self.padding[d] - self.dilation[d] * (self.kernel[d] - 1) - 1)
            // self.stride[d] + 1 - self.fewer[d]
            for d in range(2)
        ]  # fmt: skip
        gradient = torch.randn(self.batch, self.outer, *positions).to(self.dtype)
        input = torch.randn(self.batch, self.inner, *self.size).to(self.dtype)
        return LAYOUTS[self.layout](gradient), LAYOUTS[self.layout](input)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "channels_last": channels_last,
    "contiguous": lambda x: x,
    # Every other channel of a larger tensor: nothing lies side by side.
    "wide": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    # Some columns of a larger image.
    "crop": lambda x: channels_last(functional.pad(x, (0, 3)))[..., : x.shape[-1]],
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    # Begins at no multiple of 16 bytes.
    "shifted": lambda x: channels_last(x).permute(0, 2, 3, 1).flatten().repeat(2)[1:][
        : x.numel()
    ].view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2),
}  # fmt: skip

# Small enough for the interpreter; each goes another way through the kernels.
CASES = [
    # Boxes of several rows, which are parts of them, and all of them.
    Case(outer=24, inner=40, size=(9, 10)),
    Case(outer=72, inner=80, size=(4, 4), kernel=(1, 3), padding=(0, 1), dtype=torch.float16),
    Case(kernel=(2, 2), dtype=torch.float32),
    # Products of matrices, and of one position.
    Case(kernel=(1, 1), padding=(0, 0), outer=136, inner=136, size=(7, 11)),
    Case(kernel=(1, 1), padding=(0, 0), stride=(2, 2), size=(7, 6)),
    Case(size=(3, 3), padding=(0, 0)),
    # Strides and dilations; rows of the weight that a program takes at once, or in turn.
    Case(stride=(2, 2), size=(9, 8)),
    Case(stride=(2, 3), padding=(2, 0), kernel=(2, 4), size=(7, 13)),
    Case(dilation=(2, 3), padding=(2, 3), size=(8, 9), kernel=(2, 2)),
    Case(kernel=(1, 5), padding=(0, 2), size=(1, 33)),
    # Neighbours in a tile that belong to another group.
    Case(groups=2, outer=16, inner=32, kernel=(1, 3), padding=(0, 1)),
    # Elements of the weight that read nothing but padding.
    Case(size=(1, 1), stride=(2, 2)),
    Case(size=(2, 1), kernel=(2, 3), padding=(3, 3), stride=(3, 3)),
    # Transposed: the input reaches further than the gradient.
    Case(stride=(3, 2), size=(12, 9), fewer=(1, 0)),
    # Few channels: rows of the weight as channels, or element by element.
    Case(inner=3, size=(8, 8), kernel=(3, 5), stride=(2, 1), padding=(1, 2)),
    Case(inner=3, outer=6, size=(8, 8), kernel=(3, 5), stride=(2, 1), padding=(1, 2)),
    Case(inner=3, kernel=(1, 1), padding=(0, 0)),
    Case(groups=6, outer=12, inner=6),
    Case(outer=5, inner=7, layout="contiguous", dtype=torch.float32),
    Case(inner=6, groups=2, layout="wide", dtype=torch.float16),
    # Layouts that are copied, and one that is not.
    Case(layout="contiguous", inner=72, kernel=(1, 3), padding=(0, 1)),
    Case(layout="contiguous", size=(4, 4), kernel=(1, 3), padding=(0, 1)),
    Case(layout="contiguous", kernel=(1, 1), padding=(0, 0), size=(8, 9), outer=24, inner=40),
    Case(layout="contiguous", kernel=(1, 1), padding=(0, 0), size=(5, 5)),
    Case(layout="contiguous", kernel=(1, 1), padding=(0, 0), size=(1, 1)),
    Case(layout="wide", kernel=(1, 3), padding=(0, 1)),
    Case(layout="crop", stride=(2, 2), kernel=(1, 3), padding=(0, 1)),
    Case(layout="batch_last", kernel=(1, 3), padding=(0, 1)),
    Case(layout="shifted", kernel=(1, 3), padding=(0, 1)),
    # Samples that are cut into parts, and many for each program.
    Case(batch=1, size=(18, 20), kernel=(1, 2), padding=(0, 0)),
    Case(batch=1, size=(18, 20), kernel=(1, 2), padding=(0, 0), inner=3, outer=5),
    Case(batch=20, size=(3, 3), kernel=(1, 1), padding=(0, 0)),
    Case(batch=20, size=(3, 3), kernel=(1, 1), padding=(0, 0), inner=3, outer=5),
]
EMPTY = [
    Case(batch=0),
    Case(outer=0),
    Case(inner=0, size=(0, 3)),
    Case(size=(1, 1), fewer=(1, 0)),
]
# Several warps and steps, which only a GPU has time for.
LARGE = [
    Case(batch=40, outer=64, inner=64, size=(32, 32)),
    Case(batch=40, outer=128, inner=128, size=(16, 16)),
    Case(batch=40, outer=64, inner=256, size=(8, 8), dtype=torch.float16),
    Case(batch=20, outer=256, inner=64, size=(28, 28), stride=(2, 2), layout="contiguous"),
    Case(batch=40, outer=64, inner=64, size=(32, 32), layout="contiguous"),
    Case(
        batch=40,
        outer=128,
        inner=64,
        size=(28, 28),
        kernel=(1, 1),
        padding=(0, 0),
        layout="contiguous",
    ),
    Case(batch=20, outer=128, inner=64, size=(14, 14), kernel=(5, 5), padding=(2, 2)),
    Case(batch=9, outer=64, inner=3, size=(64, 64), kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    Case(batch=9, outer=96, inner=96, size=(17, 19), groups=3),
    Case(batch=9, outer=60, inner=12, size=(17, 19)),
    Case(batch=20, outer=64, inner=128, size=(16, 16), dtype=torch.float32, layout="contiguous"),
    Case(batch=20, outer=64, inner=128, size=(16, 16), dtype=torch.float32),
]
# Sums of up to 1000 float32 products in another order; storing in 16 bits rounds.
TOLERANCES = {torch.float32: 2e-5, HALF: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}


def moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """A copy to the GPU alone may lose the strides."""
    if device == "cpu":
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    found, expected = found.cpu().double(), expected.double()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def compare(ops, case: Case, device: str, exactness: float = TOLERANCES[torch.float32]) -> None:
    """Compare three implementations with the specification, which is given float64."""
    samples_op, norm_op, weighted_op = ops
    torch.manual_seed(0)
    gradient, input = case.operands()
    weights = torch.rand(case.batch) * (torch.arange(case.batch) % 3 != 1)
    right = reference.samples(gradient.double(), input.double(), *case.geometry)
    there = [moved(x, device) for x in (gradient, input)]

    found, squares = samples_op(*there, *case.geometry, case.dtype)
    assert (found.dtype, squares.dtype) == (case.dtype, torch.float32)
    assert found.is_contiguous()
    close(found, right, max(exactness, TOLERANCES[case.dtype]))
    # Of the values as stored.
    close(squares, reference.squares(found.cpu()), 1e-5)
    squares = norm_op(*there, *case.geometry)
    assert squares.dtype == torch.float32
    close(squares, reference.squares(right), exactness)
    found = weighted_op(*there, moved(weights, device), *case.geometry)
    assert found.dtype == torch.promote_types(case.dtype, torch.float32)
    assert found.is_contiguous()
    close(found, reference.weighted(right, weights), exactness)


def check_not_finite(ops, device: str) -> None:
    """What one sample holds stays there; and what no element of the weight reads counts nowhere."""
    samples_op, norm_op, weighted_op = ops
    for outer, inner in ((16, 16), (16, 3), (5, 3)):
        case = Case(3, outer, inner, (9, 8), (3, 3), (2, 2), (0, 0), layout="contiguous")
        gradient, input = case.operands()
        # The last column is read by none: there are (8 - 3) // 2 + 1 = 3 positions.
        input[0, :, :, 7] = float("inf")
        input[1, 0, 0, 0] = float("nan")
        gradient[1, 1, 1, 1] = float("inf")
        weights = torch.tensor([0.5, 0.0, 2.0])
        there = [moved(x, device) for x in (gradient, input)]
        right = reference.samples(gradient, input, *case.geometry)
        assert right[[0, 2]].isfinite().all()
        assert not right[1].isfinite().all()
        found, squares = samples_op(*there, *case.geometry, torch.float32)
        close(found[[0, 2]], right[[0, 2]], 1e-5)
        for found_squares in (squares, norm_op(*there, *case.geometry)):
            assert found_squares.isfinite().tolist() == [True, False, True]
        found = weighted_op(*there, moved(weights, device), *case.geometry)
        close(found, reference.weighted(right, weights), 1e-5)


def kernel_ops():
    from flashnorm_compile.kernels.convolution import launch

    return launch.convolution_samples, launch.convolution_norm, launch.convolution_weighted


def check_kernels(device: str) -> None:
    for case in CASES + EMPTY:
        compare(kernel_ops(), case, device)
    check_not_finite(kernel_ops(), device)


@pytest.mark.parametrize("case", CASES + EMPTY, ids=str)
def test_the_ops_on_the_cpu_equal_the_reference(case):
    compare(OPS, case, "cpu")
    compare(OPS, replace(case, dtype=torch.float64), "cpu", TOLERANCES[torch.float64])


def test_the_ops_keep_what_is_not_finite_apart():
    check_not_finite(OPS, "cpu")


@pytest.mark.parametrize("case", CASES[:11], ids=str)
def test_the_reference_is_what_autograd_finds_for_each_sample(case):
    gradient, input = (x.double() for x in case.operands())
    weight = torch.zeros(
        case.outer, case.inner // case.groups, *case.kernel, dtype=torch.float64, requires_grad=True
    )
    options = case.stride, case.padding, case.dilation, case.groups
    expected = [
        torch.autograd.grad(functional.conv2d(x[None], weight, None, *options), weight, g[None])[0]
        for x, g in zip(input, gradient, strict=True)
    ]
    found = reference.samples(gradient, input, *case.geometry)
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("output_padding", [(0, 0), (1, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_exchanges_gradient_and_input(groups, output_padding):
    stride, padding, dilation = (3, 2), (1, 2), (2, 1)
    weight = torch.zeros(8, 6 // groups, 3, 4, dtype=torch.float64, requires_grad=True)
    input = torch.randn(3, 8, 5, 4, dtype=torch.float64)

    def output(x):
        options = stride, padding, output_padding, groups, dilation
        return functional.conv_transpose2d(x, weight, None, *options)

    gradient = torch.randn_like(output(input))
    expected = [
        torch.autograd.grad(output(x[None]), weight, g[None])[0]
        for x, g in zip(input, gradient, strict=True)
    ]
    geometry = list(weight.shape[2:]), list(stride), list(padding), list(dilation), groups
    found, _ = convolution_samples(input, gradient, *geometry, torch.float64)
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_equal_the_reference_in_the_interpreter():
    run_interpreted("import test_convolution_kernel as t; t.check_kernels('cpu')")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_equal_the_reference_on_the_gpu():
    check_kernels("cuda")
    for case in LARGE:
        compare(OPS, case, "cuda")
    # Left to the composition.
    compare(OPS, replace(CASES[0], dtype=torch.float64), "cuda", TOLERANCES[torch.float64])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_product_is_under_way_while_its_operand_in_registers_is_overwritten():
    """What Triton 3.6 allows (https://github.com/triton-lang/triton/issues/9433)."""
    from flashnorm_compile.kernels.convolution.boxes import boxes_kernel
    from flashnorm_compile.kernels.convolution.elements import elements_kernel

    for case in LARGE:
        compare(OPS, case, "cuda")
    caches = [c[0] for k in (boxes_kernel, elements_kernel) for c in k.device_caches.values()]
    assert any(caches)
    for compiled in (kernel for cache in caches for kernel in cache.values()):
        lines = compiled.asm["ttgir"].splitlines()
        products = [line.split(" : ")[-1] for line in lines if "warp_group_dot " in line]
        if not all(types.startswith("!ttg.memdesc") for types in products):
            waits = [line for line in lines if "warp_group_dot_wait" in line]
            assert all("pendings = 0 " in line for line in waits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float32_operands_are_rounded_only_if_tf32_is_allowed(monkeypatch):
    case = LARGE[-1]
    compare(OPS, case, "cuda")
    with pytest.raises(AssertionError), monkeypatch.context() as patch:
        patch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
        compare(OPS, case, "cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    compare(OPS, case, "cuda", 3e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_other_batch_sizes_launch_the_kernels_that_are_there():
    from flashnorm_compile.kernels.convolution.boxes import boxes_kernel
    from flashnorm_compile.kernels.convolution.elements import elements_kernel

    def call(batch: int) -> None:
        for outer in (16, 5):
            case = Case(batch, outer, size=(40, 40))
            gradient, input = (moved(x, "cuda") for x in case.operands())
            convolution_norm(gradient, input, *case.geometry)
            convolution_weighted(gradient, input, torch.ones(batch, device="cuda"), *case.geometry)

    def compiled() -> int:
        kernels = boxes_kernel, elements_kernel
        return sum(len(c[0]) for k in kernels for c in k.device_caches.values())

    call(100)
    # Few samples are cut into parts: another mode of the same kernel.
    call(7)
    before = compiled()
    for batch in (1, 2, 16, 17, 101, 256):
        call(batch)
    assert compiled() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [CASES[0], CASES[14], CASES[18], CASES[20], CASES[29]], ids=str)
def test_the_kernels_do_not_synchronise(case):
    gradient, input = (moved(x, "cuda") for x in case.operands())
    weights = torch.ones(case.batch, device="cuda")

    def call() -> None:
        convolution_samples(gradient, input, *case.geometry, case.dtype)
        convolution_norm(gradient, input, *case.geometry)
        convolution_weighted(gradient, input, weights, *case.geometry)

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_call_gives_the_same_bits():
    case = LARGE[0]
    gradient, input = (moved(x, "cuda") for x in case.operands())
    weights = torch.rand(case.batch, device="cuda")
    for op, arguments in (
        (convolution_norm, (gradient, input)),
        (convolution_weighted, (gradient, input, weights)),
    ):
        first = op(*arguments, *case.geometry)
        assert all(torch.equal(first, op(*arguments, *case.geometry)) for _ in range(20))


def test_the_ops_are_sound_custom_ops():
    case = Case(inner=3, dtype=torch.float32)
    gradient, input = case.operands()
    torch.library.opcheck(convolution_samples, (gradient, input, *case.geometry, HALF))
    torch.library.opcheck(convolution_norm, (gradient, input, *case.geometry))
    torch.library.opcheck(convolution_weighted, (gradient, input, torch.rand(2), *case.geometry))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": torch.ones(2, 4, 5)},
         r"gradient is torch.float32, 3-d; expected floating \[B, O, Ho, Wo\]"),
        ({"input": torch.ones(2, 6, 5, 5, dtype=torch.int64)},
         r"input is torch.int64, 4-d; expected floating \[B, C, H, W\]"),
        ({"input": torch.ones(2, 6, 5, 5, dtype=HALF)},
         "gradient is torch.float32 on cpu and input torch.bfloat16 on cpu; expected one dtype"),
        ({"input": torch.ones(2, 6, 5, 5, device="meta")}, "on cpu and input .* on meta"),
        ({"input": torch.ones(3, 6, 5, 5)}, "gradient holds 2 samples and input 3"),
        ({"stride": [1]}, r"stride is \[1\]; expected two numbers, 1 or more"),
        ({"dilation": [1, 0]}, r"dilation is \[1, 0\]; expected two numbers, 1 or more"),
        ({"padding": [-1, 0]}, r"padding is \[-1, 0\]; expected two numbers, 0 or more"),
        ({"kernel_size": [3, 3, 3]}, r"kernel_size is \[3, 3, 3\]; expected two numbers"),
        ({"groups": 3}, "4 channels of gradient in 3 groups"),
        ({"groups": 4}, "6 channels of input in 4 groups"),
        ({"groups": 0}, "4 channels of gradient in 0 groups"),
        ({"padding": [1, 0]},
         r"5 positions of gradient reach element 6 of an input of 5 with padding 0 \(dim 3\)"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_what_was_found_and_what_is_valid(change, message):
    valid = {
        "gradient": torch.ones(2, 4, 5, 5),
        "input": torch.ones(2, 6, 5, 5),
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
    }
    for op, more in zip(OPS, ({"out_dtype": HALF}, {}, {"weights": torch.ones(2)}), strict=True):
        op(**valid, **more)
        with pytest.raises(ValueError, match=message):
            op(**(valid | change), **more)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            torch.ones(2, dtype=HALF),
            r"weights is torch.bfloat16 \[2\]; expected torch.float32 \[B\]",
        ),
        (torch.ones(2, 1), r"weights is torch.float32 \[2, 1\]; expected"),
        (torch.ones(3), "3 weights for 2 samples"),
        (torch.ones(2, device="meta"), "weights is on meta and gradient on cpu"),
    ],
)
def test_weights_are_one_number_for_each_sample(weights, message):
    case = Case()
    with pytest.raises(ValueError, match=message):
        convolution_weighted(*case.operands(), weights, *case.geometry)


def test_samples_are_stored_in_a_floating_dtype():
    case = Case()
    with pytest.raises(ValueError, match=r"out_dtype is torch.int32; expected a real"):
        convolution_samples(*case.operands(), *case.geometry, torch.int32)
