"""The training run behind ``flashnorm train``: settings, loop, checkpoints, files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from flashnorm_compile.accounting import PrivacyAccountant
from flashnorm_compile.noise_streams import repeat_noise
from flashnorm_compile.training import checkpoint, figure, metrics
from flashnorm_compile.training.baseline import BaselineResult, train_baseline
from flashnorm_compile.training.command import new_config
from flashnorm_compile.training.config import (
    ConfigError,
    PrivacyPlan,
    TrainConfig,
    delta_text,
    extend,
    plan_privacy,
)
from flashnorm_compile.training.data import Split, load_split
from flashnorm_compile.training.interrupt import stop_on_interrupt
from flashnorm_compile.training.loop import EpochRecord, PrivateRun
from flashnorm_compile.training.models import DigitsNet

SMALL = TrainConfig(
    epsilon=None, noise_multiplier=4.0, batch_size=480, epochs=2, seed=3, lowering="eager"
)


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split()


def start(config: TrainConfig, split: Split) -> PrivateRun:
    return PrivateRun(config, plan_privacy(config, split.num_train), split)


def train(run: PrivateRun, stop_after: float = math.inf) -> PrivateRun:
    """Train until the end, or until a number of steps is done in this call."""
    done = itertools.count(1)
    stopped = False

    def on_step(_record: Any) -> None:
        nonlocal stopped
        stopped = next(done) >= stop_after

    run.train(on_step=on_step, on_epoch=lambda _record: None, should_stop=lambda: stopped)
    return run


def test_the_split_is_fixed_and_stratified(split: Split) -> None:
    assert (len(split.train_y), len(split.test_y)) == (1437, 360)
    assert split.train_x.shape == (1437, 1, 8, 8)
    assert (split.train_x.min(), split.train_x.max()) == (0.0, 1.0)
    assert torch.equal(load_split().test_x, split.test_x)
    shares = torch.bincount(split.test_y) / torch.bincount(split.train_y)
    assert torch.allclose(shares, torch.full((10,), 0.25), atol=0.02)


def test_only_learned_weights_are_parameters_and_saved() -> None:
    names = ["convolution.weight", "norm.weight", "norm.bias", "read_out.weight", "read_out.bias"]
    assert [name for name, _ in DigitsNet().named_parameters()] == names
    assert list(DigitsNet().state_dict()) == names


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"noise_multiplier": 1.0}, "--epsilon and --noise-multiplier were both given"),
        ({"epsilon": None}, "both given or both left out; give one"),
        ({"epsilon": -1.0}, "--epsilon is -1.0; expected a number above 0"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm is 0.0; expected a number above 0"),
        ({"learning_rate": math.nan}, "--lr is nan; expected a number above 0"),
        ({"delta": 1.0}, "--delta is 1.0; expected a number between 0 and 1"),
        ({"epochs": 0}, "--epochs is 0; expected at least 1"),
        ({"batch_size": 0}, "--batch-size is 0; expected at least 1"),
        ({"seed": -1}, "--seed is -1; expected an integer from 0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace("*", r"\*")):
        TrainConfig(**settings)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="--batch-size is 360, but there are 100 training"):
        plan_privacy(TrainConfig(), 100)


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="--epsilon is 1e-09: target_epsilon is 1e-09"):
        plan_privacy(TrainConfig(epsilon=1e-9), 1437)


def test_the_plan_stays_within_the_target() -> None:
    plan = plan_privacy(TrainConfig(), 1437)
    assert plan.sampling_rate == 360 / 1437
    assert (plan.steps_per_epoch, plan.steps) == (4, 120)
    assert 2.99 < plan.epsilon <= 3.0


def test_more_epochs_cost_more_and_are_refused_beyond_the_target() -> None:
    config = TrainConfig(epsilon=None, noise_multiplier=4.0, epochs=10)
    plan = plan_privacy(config, 1437)
    longer, extended = extend(config, plan, 20)
    assert (longer.epochs, extended.steps) == (20, 80)
    assert extended.epsilon > plan.epsilon
    planned = TrainConfig(epochs=10)
    with pytest.raises(ConfigError, match=r"--epochs is 20, .* this run's target is ε = 3"):
        extend(planned, plan_privacy(planned, 1437), 20)


def test_the_step_size_follows_the_optimizer() -> None:
    assert new_config({}).learning_rate == 0.5
    assert new_config({"optimizer": "adam"}).learning_rate == 0.02
    assert new_config({"optimizer": "adam", "learning_rate": 0.1}).learning_rate == 0.1


def test_delta_is_written_as_people_do() -> None:
    assert [delta_text(delta) for delta in (1e-5, 1e-12, 0.001)] == ["1e-5", "1e-12", "0.001"]


def test_every_step_is_a_recorded_release(split: Split) -> None:
    run = train(start(SMALL, split))
    expected = PrivacyAccountant()
    expected.record(noise_multiplier=4.0, sampling_rate=480 / 1437, count=6)
    assert run.finished
    assert len(run.steps) == 6
    assert run.accountant.history == expected.history
    assert run.epochs[-1].epsilon == pytest.approx(expected.epsilon(1e-5))
    assert run.epochs[0].epsilon < run.epochs[1].epsilon


def test_an_empty_batch_is_a_step(split: Split) -> None:
    run = start(dataclasses.replace(SMALL, batch_size=1), split)
    run.plan = dataclasses.replace(run.plan, steps_per_epoch=1)
    run.sampler.state_dict()
    before = run.model.read_out.weight.detach().clone()
    record = run._step([])
    assert (record.loss, record.clip_fraction, record.nonfinite_samples) == (None, None, 0)
    assert run.accountant.history[0].count == 1
    assert not torch.equal(run.model.read_out.weight, before)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_stopped_anywhere_continues_as_if_it_had_not(
    split: Split, tmp_path: Path, optimizer: Any
) -> None:
    config = dataclasses.replace(SMALL, optimizer=optimizer, learning_rate=0.05)
    with repeat_noise():
        whole = train(start(config, split))
    with repeat_noise():
        first = train(start(config, split), stop_after=4)
    assert (len(first.steps), len(first.epochs)) == (4, 1)
    checkpoint.save(tmp_path / "checkpoint.pt", first)

    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    second = PrivateRun(saved.config, saved.plan, split)
    with repeat_noise():
        second.load_state_dict(saved.state)
    train(second)

    assert saved.config == config
    assert second.accountant.history == whole.accountant.history
    assert second.sampler.state_dict() == whole.sampler.state_dict()
    assert second.step.state_dict() == whole.step.state_dict()
    for name, value in whole.averaged.state_dict().items():
        torch.testing.assert_close(second.averaged.state_dict()[name], value, msg=name)
    for ours, theirs in zip(second.epochs, whole.epochs, strict=True):
        assert without_time(ours) == pytest.approx(without_time(theirs), rel=1e-4)


def without_time(record: EpochRecord) -> dict[str, Any]:
    return {name: x for name, x in dataclasses.asdict(record).items() if name != "seconds"}


def test_a_checkpoint_is_readable_by_its_owner_only(split: Split, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, start(SMALL, split))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (None, "there is no file"),
        (b"not a checkpoint", "is not a checkpoint that can be read"),
        ({"version": 99}, r"is not a checkpoint of this version \(1\)"),
        (torch.zeros(2), r"is not a checkpoint of this version \(1\)"),
    ],
)
def test_what_is_no_checkpoint_is_refused(contents: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents is not None:
        torch.save(contents, path)
    with pytest.raises(ConfigError, match=f"--resume: .*{expected}"):
        checkpoint.load(path)


def test_the_default_run_is_accurate_at_epsilon_3(split: Split) -> None:
    run = train(start(TrainConfig(seed=1, lowering="eager"), split))
    train_accuracy, test_accuracy = run.evaluate()
    assert run.epsilon <= 3.0
    assert test_accuracy > 0.92
    # A model that cannot memorise does as well on new images as on those it saw.
    assert abs(train_accuracy - test_accuracy) < 0.04


def test_the_baseline_learns_and_leaves_random_state_alone(split: Split) -> None:
    state = torch.get_rng_state()
    seen = []
    result = train_baseline(
        split, epochs=3, seed=0, on_epoch=lambda: seen.append(1), should_stop=lambda: False
    )
    assert result is not None
    assert result.test_accuracy > 0.9
    assert len(seen) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_a_baseline_that_was_stopped_has_no_result(split: Split) -> None:
    stopped = train_baseline(
        split, epochs=3, seed=0, on_epoch=lambda: None, should_stop=lambda: True
    )
    assert stopped is None


def test_metrics_are_standard_json_without_noise_too(split: Split, tmp_path: Path) -> None:
    run = start(SMALL, split)
    run.accountant.record(noise_multiplier=0.0, sampling_rate=0.5)
    assert math.isinf(run.epsilon)
    metrics.write(tmp_path / "metrics.json", metrics.collect(run, None))
    written = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert written["privacy"]["epsilon"] is None
    assert written["timings"]["median_step_seconds"] is None
    assert written["baseline"] is None
    assert written["finished"] is False


@pytest.mark.parametrize("epochs", [0, 1, 3])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_the_figure_is_drawn_for_any_length(
    tmp_path: Path, epochs: int, with_baseline: bool
) -> None:
    records = [EpochRecord(i + 1, i, 0.5 * i, 1.0, 0.5, 0, 0.8, 0.7, 1.0) for i in range(epochs)]
    baseline = BaselineResult(3, 1.0, 0.98, 1.0) if with_baseline else None
    figure.draw(tmp_path / "curve.png", TrainConfig(), records, baseline)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_is_a_request_once_and_an_interrupt_twice() -> None:
    noted = []
    previous = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt(lambda: noted.append(1)) as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        assert noted == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is previous


def test_a_plan_survives_the_round_trip() -> None:
    plan = plan_privacy(SMALL, 1437)
    assert PrivacyPlan(**dataclasses.asdict(plan)) == plan
    assert TrainConfig(**SMALL.to_dict()) == SMALL
