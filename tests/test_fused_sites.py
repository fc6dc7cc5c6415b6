"""Sites that use the kernels of this package: the oracle's gradients, with every strategy."""

from __future__ import annotations

import pytest
import torch
from driver import Case, check_case, clip, private_step, read_result, run_oracle
from oracle import assert_matches_oracle
from torch import nn
from zoo_attention import ATTENTION
from zoo_conv import CONV
from zoo_dense import DENSE
from zoo_sharing import SHARING

from flashnorm_compile.passes.sites import fused_convolution, fused_matmul

STRATEGIES = ("materialize", "ghost", "flash")
CASES = {
    **{name: DENSE[name] for name in ("mlp_time_axis", "mlp_five_dims", "time_first", "batch_last",
                                      "transposed_inside")},
    "encoder_layer": ATTENTION["encoder_layer"],
    **{name: SHARING[name] for name in ("tied_head", "linear_twice_time_axis", "overlapping_slices",
                                        "weight_and_its_transpose_time")},
}  # fmt: skip
CONVOLUTIONS = [
    name for name in CONV if name.startswith(("conv2d", "conv_transpose2d", "residual_block"))
]


def linear_case(dtype: torch.dtype = torch.float32, precision: str = "float32") -> Case:
    return Case(
        f"linear-{dtype}",
        lambda: nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype),
        lambda b: (torch.randn(b, 7, 6, dtype=dtype),),
        lambda model, x: model(x).float().square().mean(),
        precision=precision,
    )


def strategies_of_weights(plan) -> set[str]:
    return {row.strategy for row in plan.rows if row.sites == ("matmul",)}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, strategy):
    check_case(CASES[name], strategy, kernels="fused")


@pytest.mark.parametrize(("hopper", "kernels"), [(True, "fused"), (False, "library")])
def test_kernels_are_chosen_where_they_are_fast(hopper, kernels, monkeypatch):
    monkeypatch.setattr(fused_matmul, "has_fast_kernels", lambda device: hopper)
    monkeypatch.setattr(fused_matmul, "MIN_WIDTH", 3)
    case = linear_case()
    step = private_step(case.loss)
    step(case.build_model(), *case.build_batch())
    weights = [row for row in step.plan.rows if row.sites == ("matmul",)]
    assert len(weights) == 2
    assert all(row.fused == (kernels == "fused") for row in weights)
    assert f"  {kernels}  " in next(x for x in str(step.plan).splitlines() if "matmul" in x)


def test_narrow_products_are_left_to_the_library(monkeypatch):
    monkeypatch.setattr(fused_matmul, "has_fast_kernels", lambda device: True)
    monkeypatch.setattr(fused_matmul, "MIN_WIDTH", 4)
    case = linear_case()
    step = private_step(case.loss)
    step(case.build_model(), *case.build_batch())
    found = {row.parameter: row.fused for row in step.plan.rows if row.sites == ("matmul",)}
    assert found == {"model.0.weight": True, "model.2.weight": False}


@pytest.mark.parametrize("strategy", ["materialize", "flash"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_match_the_oracle(name, strategy):
    plan = check_case(CONV[name], strategy, kernels="fused")
    weights = [row for row in plan.rows if row.sites == ("convolution",)]
    assert {row.strategy for row in weights} == {strategy}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layers_over_tokens_get_the_strategy_that_is_asked_for(strategy):
    plan = check_case(linear_case(), strategy, kernels="fused")
    assert strategies_of_weights(plan) == {strategy}


def operations_of(step) -> set[str]:
    return {
        name
        for name in ("materialize_norms", "ghost_norms", "flash_norm", "weighted_gradients",
                     "convolution_samples", "convolution_norm", "convolution_weighted")
        if f"flashnorm.{name}.default" in step.graphs[-1]
    }


@pytest.mark.parametrize(
    ("strategy", "kernels", "operations"),
    [
        ("materialize", "fused", {"materialize_norms"}),
        ("ghost", "fused", {"ghost_norms", "weighted_gradients"}),
        ("flash", "fused", {"flash_norm", "weighted_gradients"}),
        # There is no flash norm without the kernel.
        ("flash", "library", {"flash_norm", "weighted_gradients"}),
        ("ghost", "library", set()),
        ("materialize", "library", set()),
    ],
)
def test_kernels_are_used_where_they_are_asked_for(strategy, kernels, operations):
    case = linear_case()
    step = private_step(case.loss, strategy=strategy, kernels=kernels)
    step(case.build_model(), *case.build_batch())
    assert operations_of(step) == operations


@pytest.mark.parametrize(("mode", "fused"), [("reduce-overhead", True), (None, False)])
def test_convolutions_use_kernels_where_launches_are_replayed(mode, fused, monkeypatch):
    monkeypatch.setattr(fused_convolution, "has_fast_kernels", lambda device: True)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.Tanh()).bfloat16()
    step = private_step(lambda model, x: model(x).float().square().mean(), mode=mode)
    step(model, torch.randn(4, 4, 8, 8, dtype=torch.bfloat16))
    assert [row.fused for row in step.plan.rows] == [fused]


@pytest.mark.parametrize(
    ("strategy", "operations"),
    [
        ("materialize", {"convolution_samples"}),
        ("flash", {"convolution_norm", "convolution_weighted"}),
        ("ghost", {"convolution_weighted"}),
    ],
)
def test_kernels_of_convolutions(strategy, operations):
    case = CONV["conv2d_no_bias"]
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.Tanh())
    step = private_step(case.loss, strategy=strategy, kernels="fused")
    step(model, *case.build_batch())
    assert operations_of(step) == operations


def test_one_token_per_sample_needs_no_kernel():
    case = linear_case()
    step = private_step(case.loss, strategy="ghost", kernels="fused")
    step(case.build_model(), torch.randn(4, 6))
    assert operations_of(step) == set()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision(strategy):
    check_case(linear_case(torch.bfloat16, "bfloat16"), strategy, kernels="fused")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_left_out(strategy, value):
    case = linear_case()
    (x,) = case.build_batch()
    x[1, 2, 3] = value
    model, step = case.build_model(), private_step(case.loss, strategy=strategy, kernels="fused")
    result = read_result(step, model, step(model, x))
    expected = clip(run_oracle(case, (x,)), 1.0, "mean")
    assert result.nonfinite_samples == 1
    assert_matches_oracle(
        expected, norms=result.norms, factors=result.factors, grads=result.grads
    )


@pytest.mark.inductor
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_matches_oracle_with_inductor(strategy):
    check_case(CASES["time_first"], strategy, lowering="inductor", kernels="fused")


@pytest.mark.parametrize("strategy", ["ghost", "flash"])
def test_batches_of_other_sizes_need_no_other_graph(strategy):
    case = linear_case()
    step = private_step(case.loss, strategy=strategy, kernels="fused")
    model = case.build_model()
    for size in (4, 3, 9):
        step(model, torch.randn(size, 7, 6))
    assert len(step.graphs) == 1
