"""flashnorm::ghost_norm and flashnorm::ghost_product: sums over Gram matrices, and the kernel."""

from __future__ import annotations

import dataclasses
import importlib.util
from unittest import mock

import pytest
import torch
from interpreter import run_interpreted

from flashnorm_compile.kernels.ghost_norm import (
    ghost_norm,
    ghost_norms,
    ghost_product,
    planning,
    reference,
)
from flashnorm_compile.passes.sites import rounding

HALF = (torch.bfloat16, torch.float16)
# One tile of each size, two and three tiles to a side; widths of more than one step, and of a part.
SIZES = [
    (3, 1, 5, 1),
    (4, 16, 24, 8),
    (2, 27, 136, 300),
    (3, 50, 70, 24),
    (4, 128, 64, 72),
    (3, 130, 72, 40),
    (2, 300, 200, 16),
]
# All sums are of squares of norms: float32 additions in another order.
TOLERANCE = 1e-5


def operands(B: int, T: int, m: int, n: int, dtype: torch.dtype, device: str = "cpu"):
    left = torch.randn(B, m, T, dtype=torch.float32).to(device, dtype)
    return left, torch.randn(B, T, n, dtype=torch.float32).to(device, dtype)


def layouts(x: torch.Tensor):
    """[B, T, d] as a product leaves it, tokens first, tokens side by side, and in worse ways."""
    samples, tokens, width = x.shape
    padded = x.new_full((samples, tokens + 3, width + 8 + -width % 8), float("nan"))
    inside = padded[:, :tokens, :width]
    yield x
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield x.mT.contiguous().mT
    yield inside.copy_(x)
    yield padded.roll(5, 2)[:, :tokens, 5 : 5 + width]
    yield x[:1].expand_as(x)


def compare(found: torch.Tensor, right: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (torch.float32, right.shape)
    # A product of two sites may cancel; the other sums say how large its terms are.
    scale = right.abs().amax(0).clamp(min=1e-30)
    found = found.double()
    torch.testing.assert_close(found / scale, right / scale, atol=TOLERANCE, rtol=TOLERANCE)


def norm(ops, *layer) -> torch.Tensor:
    """One layer's sums."""
    return ops.ghost_norms(*([x] for x in layer))[:, 0]


def errors_of(left, right) -> tuple[float, float]:
    return left.shape[1] * 2.0**-20, right.shape[2] * 2.0**-20


def check_norm(ops, left, right) -> None:
    layer = left, right, *errors_of(left, right)
    compare(norm(ops, *layer), reference.ghost_norm(*layer))


def check_layers(ops, device: str) -> None:
    """Layers of one call, alike or not, more than a launch takes: each has its own sums."""
    for B, T in ((4, 20), (1, 136)):
        layers = []
        for k in range(21):
            m, n = 8 * (1 + k % 5), 8 * (1 + k % 3)
            dtype, tokens = HALF[k == 11], T + (k == 3)
            left, right = operands(B, tokens, m, n, dtype, device)
            if k % 7 == 6:
                left = left.mT.contiguous().mT
            layers.append((left, right, *errors_of(left, right)))
        layers.append((left[:, :0], right, 0.0, 0.0))
        found = ops.ghost_norms(*(list(x) for x in zip(*layers, strict=True)))
        assert found.shape == (4, len(layers), B)
        for k, layer in enumerate(layers):
            compare(found[:, k], reference.ghost_norm(*layer))


def check_product(run, left, right, left2, right2) -> None:
    norms = [
        rounding.row_norms(x, dim) for x, dim in ((left, 1), (right, 2), (left2, 1), (right2, 2))
    ]
    found = run(left, right, left2, right2, *norms)
    compare(found, reference.ghost_product(left, right, left2, right2, *norms))


def check_sizes(ops, device: str) -> None:
    for position, (B, T, m, n) in enumerate(SIZES):
        left, right = operands(B, T, m, n, HALF[position % 2], device)
        check_norm(ops, left, right)
        S = (T + 5) // 2
        check_product(ops.ghost_product, left, right, *operands(B, S, m, n, left.dtype, device))
    for B, T, m, n in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        left, right = operands(B, T, m, n, torch.bfloat16, device)
        check_norm(ops, left, right)
        check_product(ops.ghost_product, left, right, left, right)


def check_layouts(ops, device: str) -> None:
    for B, T, m, n in ((2, 20, 24, 17), (2, 136, 40, 8), (1, 24, 8, 16)):
        left, right = operands(B, T, m, n, torch.bfloat16, device)
        left2, right2 = operands(B, 9, m, n, torch.bfloat16, device)
        for x, y in zip(layouts(left.mT), layouts(right), strict=True):
            check_norm(ops, x.mT, y)
            check_product(ops.ghost_product, left2, right2, x.mT, right)


def check_others_stay(ops, device: str) -> None:
    """What is not finite in one sample is not seen in another's sums, bit by bit."""
    for T in (20, 130):
        left, right = operands(4, T, 24, 16, torch.bfloat16, device)
        norms = rounding.row_norms(left, 1), rounding.row_norms(right, 2)
        clean = norm(ops, left, right, 1e-5, 1e-5)
        product = ops.ghost_product(left, right, left, right, *norms, *norms)
        left[1, 3, -1], right[2, 0, 0] = float("inf"), float("nan")
        found = norm(ops, left, right, 1e-5, 1e-5)
        found_product = ops.ghost_product(left, right, left, right, *norms, *norms)
        assert not found[0, 1:3].isfinite().any()
        torch.testing.assert_close(found[:, ::3], clean[:, ::3], rtol=0, atol=0)
        torch.testing.assert_close(found_product[:, ::3], product[:, ::3], rtol=0, atol=0)


def check_bounds(ops, device: str) -> None:
    """Norms of rows are not below what they are, and errors not above what is said."""
    for T, m, n in ((60, 40, 24), (200, 136, 64)):
        left, right = operands(3, T, m, n, torch.bfloat16, device)
        # Tokens that cancel: of the norm nothing is left but rounding errors.
        left[:, :, 1::2], right[:, 1::2] = -left[:, :, ::2], right[:, ::2]
        # Squares that are flushed to zero.
        left[0] *= 2.0**-100
        product = torch.empty(0, dtype=torch.float32)
        errors = rounding.gram_error(product, m), rounding.gram_error(product, n)
        square, spread, by_left, by_right = norm(ops, left, right, *errors).double()
        true, *_ = reference.ghost_norm(left, right, 0.0, 0.0)
        assert ((square - true).abs() <= errors[0] * by_left + errors[1] * by_right).all()
        a, g = left.double().norm(dim=1), right.double().norm(dim=2)
        assert (true < 1e-9 * (a * g).sum(1) ** 2).all()
        assert (spread >= (a * g).sum(1)).all()
        pairs = (right.double() @ right.double().mT).abs()
        assert (by_left >= (pairs * a.unsqueeze(1) * a.unsqueeze(2)).sum((1, 2))).all()
        pairs = (left.double().mT @ left.double()).abs()
        weights = (pairs * g.unsqueeze(1) * g.unsqueeze(2)).sum((1, 2))
        assert (by_right >= weights)[1:].all()


def clear() -> None:
    planning.read.cache_clear()
    planning.plan.cache_clear()


def check_kernel(device: str) -> None:
    from flashnorm_compile.kernels.ghost_norm import launch

    torch.manual_seed(0)
    check_sizes(launch, device)
    check_layers(launch, device)
    check_layouts(launch, device)
    check_others_stay(launch, device)
    check_bounds(launch, device)
    # Tiles that are left over in many parts; memory read by pointers.
    found = launch.find_device(torch.device(device))
    pointers = dataclasses.replace(found, descriptors=False)
    clear()
    with mock.patch.object(planning, "SPLIT_WIDTH", 32):
        check_sizes(launch, device)
        check_layers(launch, device)
    # Products of long rows by the library.
    clear()
    with mock.patch.object(planning, "LONG_WIDTH", 64):
        check_sizes(launch, device)
        check_others_stay(launch, device)
    clear()
    with mock.patch.object(launch, "find_device", return_value=pointers):
        check_layouts(launch, device)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernel_equals_reference_in_the_interpreter():
    run_interpreted("import test_ghost_norm_kernel as t; t.check_kernel('cpu')")


@pytest.mark.parametrize(
    ("tiles", "width", "expected"),
    [
        (128, 10240, (128, 1)),  # nearly all of 132 programs have something to do
        (160, 10240, (132, 4)),  # 28 are left, and made in quarters
        (192, 51032, (132, 2)),
        (192, 3840, (192, 1)),  # the halves would be too short
        (384, 51032, (384, 1)),  # 120 are left
        (3, 51032, (0, 16)),
    ],
)
def test_tiles_of_the_last_round_are_split_if_that_pays(tiles, width, expected):
    assert planning._split(tiles, 132, width) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_equals_reference_on_the_gpu():
    check_kernel("cuda")


def test_the_op_on_the_cpu_equals_the_reference():
    from flashnorm_compile.kernels.ghost_norm import op

    torch.manual_seed(0)
    check_sizes(op, "cpu")
    check_layers(op, "cpu")
    check_layouts(op, "cpu")
    check_bounds(op, "cpu")


def test_the_sums_are_those_of_the_products():
    torch.manual_seed(0)
    (left, right), (left2, right2) = (operands(3, T, 6, 5, torch.float64) for T in (7, 4))
    gradient, gradient2 = left @ right, left2 @ right2
    square, spread, by_left, by_right = ghost_norm(left, right, 0.0, 0.0).double()
    a, g = left.norm(dim=1), right.norm(dim=2)
    torch.testing.assert_close(square, gradient.square().sum((1, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(spread, (a * g).sum(1), rtol=1e-6, atol=0)
    for found, products, norms in (
        (by_left, right @ right.mT, a), (by_right, left.mT @ left, g)
    ):  # fmt: skip
        weights = torch.einsum("bt,bs->bts", norms, norms)
        torch.testing.assert_close(found, (products.abs() * weights).sum((1, 2)), rtol=1e-6, atol=0)
    norms = [x.float() for x in (a, g, left2.norm(dim=1), right2.norm(dim=2))]
    product, by_left, _ = ghost_product(left, right, left2, right2, *norms).double()
    torch.testing.assert_close(product, (gradient * gradient2).sum((1, 2)), rtol=1e-6, atol=1e-4)
    weights = torch.einsum("bt,bs->bts", norms[0].double(), norms[2].double())
    pairs = (right @ right2.mT).abs()
    torch.testing.assert_close(by_left, (pairs * weights).sum((1, 2)), rtol=1e-6, atol=0)


def test_slack_follows_from_the_sums():
    """What `rounding` adds to norms and products can be had from the ops."""
    assert reference.FLOOR == rounding._FLOOR
    torch.manual_seed(0)
    (left, right), (left2, right2) = (operands(3, T, 24, 40, torch.bfloat16) for T in (9, 6))
    rule = rounding.Rounding(0.0, 2.0**-8, 2.0**-24)
    gram = torch.empty(0, dtype=torch.float64)
    errors = rounding.gram_error(gram, 24), rounding.gram_error(gram, 40)
    for scale_left in (True, False):
        right_square, right_slack = rounding.ghost_square(left, right, rule, scale_left=scale_left)
        square, spread, by_left, by_right = ghost_norm(left, right, *errors)
        scaled = rule.scaled_slack * (by_left if scale_left else by_right)
        error = errors[0] * by_left + errors[1] * by_right
        slack = rule.spread_slack(spread, 9) + scaled + error
        torch.testing.assert_close(square.double(), right_square, rtol=1e-6, atol=0)
        torch.testing.assert_close(slack.double(), right_slack, rtol=1e-6, atol=0)
    norms = [
        rounding.row_norms(x, dim) for x, dim in ((left, 1), (right, 2), (left2, 1), (right2, 2))
    ]
    product, by_left, by_right = ghost_product(left, right, left2, right2, *norms)
    right_product, right_error = rounding.ghost_product(left, right, left2, right2)
    error = errors[0] * by_left.double() + errors[1] * by_right.double()
    torch.testing.assert_close(product.double(), right_product, rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(error, right_error.double(), rtol=1e-6, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [20, 200])
def test_other_batch_sizes_launch_the_kernel_that_is_there(tokens):
    from flashnorm_compile.kernels.ghost_norm import kernel

    def call(samples: int) -> None:
        left = torch.randn(tokens, samples, 64, device="cuda", dtype=torch.bfloat16)
        right = torch.randn(samples, tokens, 2048, device="cuda", dtype=torch.bfloat16)
        ghost_norm(left.permute(1, 2, 0), right, 1e-5, 1e-5)

    def compiled() -> int:
        return sum(len(caches[0]) for caches in kernel.sums_kernel.device_caches.values())

    call(2)
    before = compiled()
    for samples in (1, 3, 16, 64, 65, 1000):
        call(samples)
    assert compiled() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [20, 200])
def test_the_kernel_repeats_bit_by_bit_and_does_not_synchronise(tokens):
    left, right = operands(70, tokens, 520, 4096, torch.bfloat16, "cuda")
    first = ghost_norm(left, right, 1e-5, 1e-5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [ghost_norm(left, right, 1e-5, 1e-5) for _ in range(50)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensor_cores_add_as_precisely_as_is_said():
    """Products just below what is cut off beside the first one, which is 1."""
    largest = 0.0
    for width in (64, 1024, 8192):
        for exponent in range(20, 30):
            left = torch.full((1, width, 128), 2.0**-10, device="cuda", dtype=torch.bfloat16)
            right = torch.full_like(left.mT, (2 - 2.0**-7) * 2.0 ** (10 - exponent - 1))
            left[:, 0], right[:, :, 0] = 1.0, 1.0
            exact = (right[0, 0].double() @ left[0, :, 0].double()).item()
            bound = rounding.gram_error(left.new_empty(0, dtype=torch.float32), width)
            bound *= right[0, 0].double().norm().item() * left[0, :, 0].double().norm().item()
            ones = torch.ones(1, 128, 8, device="cuda", dtype=torch.bfloat16)
            norms = [torch.ones(1, 128, device="cuda")] * 4
            # 8·128² of one number: their sum is not rounded.
            by_kernel = ghost_product(right.mT, ones, left, ones, *norms)[0] / (8 * 128**2)
            for found in (torch.bmm(right, left, out_dtype=torch.float32), by_kernel):
                error = (found.double() - exact).abs().max().item()
                assert error <= bound
                largest = max(largest, error / width)
    assert largest > 2.0**-27, "nothing was cut off"


def test_the_ops_are_sound_custom_ops():
    left, right = operands(3, 4, 5, 6, torch.bfloat16)
    torch.library.opcheck(ghost_norms, ([left] * 2, [right] * 2, [1e-5] * 2, [1e-5] * 2))
    norms = rounding.row_norms(left, 1), rounding.row_norms(right, 2)
    torch.library.opcheck(ghost_product, (left, right, left, right, *norms, *norms))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": torch.ones(2, 3)}, r"left is torch.float32, 2-d, on cpu; expected 3-d"),
        ({"right": torch.ones(2, 4, 5).double()}, r"right is torch.float64, 3-d, on cpu; expected"),
        ({"right": torch.ones(2, 4, 5, device="meta")}, r"right is .* on meta; expected 3-d, and"),
        ({"left": torch.ones(3, 3, 4)}, r"right \[B, T, n\] is \[2, 4, 5\]; left has B = 3"),
        ({"left": torch.ones(2, 3, 6)}, r"right \[B, T, n\] is \[2, 4, 5\]; left has T = 6"),
        ({"left2": torch.ones(2, 2, 7)}, r"left2 \[B, m, S\] is \[2, 2, 7\]; left has m = 3"),
        ({"right2": torch.ones(2, 7, 6)}, r"right2 \[B, S, n\] is \[2, 7, 6\]; right has n = 5"),
        ({"left_norms": torch.ones(2)}, r"left_norms is torch.float32, 1-d, on cpu; expected"),
        ({"right_norms": torch.ones(2, 4).double()}, r"right_norms .* expected float32 \[B, T\]"),
        ({"left2_norms": torch.ones(2, 4)}, r"left2_norms \[B, S\] is \[2, 4\]; left2 has S = 7"),
    ],
)
def test_errors_name_the_argument_what_was_found_and_what_is_valid(change, message):
    valid = {
        "left": torch.ones(2, 3, 4), "right": torch.ones(2, 4, 5),
        "left2": torch.ones(2, 3, 7), "right2": torch.ones(2, 7, 5),
        "left_norms": torch.ones(2, 4), "right_norms": torch.ones(2, 4),
        "left2_norms": torch.ones(2, 7), "right2_norms": torch.ones(2, 7),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ghost_product(**(valid | change))
    if change.keys() <= {"left", "right"}:
        first = {key: valid[key] for key in ("left", "right")}
        with pytest.raises(ValueError, match=message):
            ghost_norm(**(first | change), left_error=0.0, right_error=0.0)


def test_layers_of_one_call_must_fit_each_other():
    left, right = operands(2, 3, 4, 5, torch.float32)
    message = r"have 2, 1, 1, 1 entries; expected the same number of each, 1 or more"
    with pytest.raises(ValueError, match=message):
        ghost_norms([left, left], [right], [0.0], [0.0])
    with pytest.raises(ValueError, match=r"have 0, 0, 0, 0 entries"):
        ghost_norms([], [], [], [])
    message = r"lefts\[1\] holds 1 samples on cpu and lefts\[0\] 2 on cpu; expected the same"
    with pytest.raises(ValueError, match=message):
        ghost_norms([left, left[:1]], [right, right[:1]], [0.0] * 2, [0.0] * 2)


def test_a_gpu_takes_16_bit_operands_alone():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        left, right = (torch.empty(2, 4, 4, device="cuda", dtype=torch.float32) for _ in range(2))
        with pytest.raises(ValueError, match=r"operands are torch.float32; expected bfloat16 or"):
            ghost_norm(left, right, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"operands are torch.int64; expected a floating dtype"):
        ghost_norm(torch.ones(2, 4, 4).long(), torch.ones(2, 4, 4).long(), 0.0, 0.0)
