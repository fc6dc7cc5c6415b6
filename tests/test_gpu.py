"""The backend on a CUDA device: what the CPU shows, Triton's code, CUDA graphs, no waiting."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from driver import (
    Case,
    call,
    check_case,
    check_every_strategy,
    clip,
    private_step,
    read_result,
    run_oracle,
)
from oracle import assert_matches_oracle
from test_inductor import SITES
from test_modules import WITH_INDUCTOR
from torch import nn
from typer.testing import CliRunner
from zoo_modules import all_cases

from flashnorm_compile.cli import app

CASES = {name: replace(case, device="cuda") for name, case in all_cases().items()}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def float32_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_oracle(case):
    check_every_strategy(case)


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("name", "strategy"), [*SITES, *((name, "auto") for name in WITH_INDUCTOR)]
)
def test_matches_oracle_with_inductor(name, strategy):
    check_case(CASES[name], strategy, lowering="inductor")


def tokens_case(layout: str) -> Case:
    """bfloat16 products over enough tokens for the kernels, in rows of whole 16 bytes and not."""
    unaligned = layout == "unaligned"
    tokens, width, hidden, classes = (41, 33, 39, 7) if unaligned else (48, 64, 40, 72)

    def loss(model, x):
        with torch.autocast("cuda", torch.bfloat16):
            out = model(x.transpose(0, 1) if layout == "time_first" else x)
        return out.float().square().mean()

    return Case(
        layout,
        lambda: nn.Sequential(
            nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, classes)
        ),
        lambda b: (torch.randn(b, tokens, width),),
        loss,
        precision="autocast_bfloat16",
        device="cuda",
    )  # fmt: skip


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("strategy", ["materialize", "ghost", "flash"])
@pytest.mark.parametrize("layout", ["aligned", "unaligned", "time_first"])
def test_fused_kernels_match_the_oracle(layout, strategy, lowering):
    plan = check_case(tokens_case(layout), strategy, lowering=lowering, kernels="fused")
    assert {row.strategy for row in plan.rows if row.sites == ("matmul",)} == {strategy}


@pytest.mark.parametrize("strategy", ["materialize", "ghost", "flash"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("conv-conv2d")])
def test_fused_convolutions_match_the_oracle(name, strategy):
    check_case(CASES[name], strategy, kernels="fused")


@pytest.mark.inductor
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_steps_with_other_samples_and_sizes(mode):
    case = CASES["sharing-tied_head"]
    model = case.build_model()
    step = private_step(case.loss, lowering="inductor", mode=mode)
    for size in (4, 4, 4, 6, 6, 4, 1, 0, 4):
        batch = case.build_batch(size)
        model.zero_grad()
        loss = call(step, model, batch)
        if size == 0:
            assert not any(parameter.grad.any() for parameter in model.parameters())
            continue
        expected = clip(run_oracle(case, batch), 1.0, "mean")
        found = read_result(step, model, loss)
        assert_matches_oracle(
            expected, norms=found.norms, factors=found.factors, grads=found.grads
        )


@pytest.mark.inductor
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_every_step_draws_noise_of_its_own(mode):
    case = CASES["sharing-tied_head"]
    model, batch = case.build_model(), case.build_batch()
    step = private_step(case.loss, lowering="inductor", mode=mode, seed=3)
    call(step, model, batch)
    quiet = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    step.noise_multiplier = 2.0
    draws = []
    for _ in range(40):
        model.zero_grad()
        call(step, model, batch)
        draws.append(torch.cat([
            (parameter.grad - quiet[name]).flatten() for name, parameter in model.named_parameters()
        ]))
    noise = torch.stack(draws) * 9 / 2.0
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    products = noise @ noise.t() / noise.shape[1]
    products.fill_diagonal_(0.0)
    assert products.abs().max() < 6 / noise.shape[1] ** 0.5


@pytest.mark.inductor
def test_accumulation():
    case = CASES["sharing-tied_head"]
    batch, model = case.build_batch(5), case.build_model()
    expected = clip(run_oracle(case, batch), 1.0, "mean")
    step = private_step(case.loss, lowering="inductor")
    with step.accumulate():
        for rows in (slice(0, 3), slice(3, 5)):
            loss = call(step, model, tuple(part[rows] for part in batch))
    found = read_result(step, model, loss)
    assert_matches_oracle(expected, norms=found.norms, factors=found.factors, grads=found.grads)


@pytest.mark.inductor
def test_trains_the_digits_classifier(tmp_path):
    """Its kernels were once too much for Triton's compiler."""
    result = CliRunner().invoke(app, [
        "train", "--device", "cuda", "--epochs", "2", "--no-baseline", "--output-dir", str(tmp_path)
    ])
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["device"].startswith("cuda")


@pytest.mark.inductor
def test_a_step_does_not_wait_for_the_device():
    case = CASES["sharing-tied_head"]
    model, batch = case.build_model(), case.build_batch()
    step = private_step(case.loss, lowering="inductor")
    step.noise_multiplier = 1.0
    for _ in range(3):
        model.zero_grad()
        call(step, model, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.zero_grad()
        call(step, model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
