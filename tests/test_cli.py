"""``flashnorm train`` and ``flashnorm info``, from options to files."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from flashnorm_compile.accounting import PrivacyAccountant
from flashnorm_compile.cli import app
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.noise_streams import repeat_noise
from flashnorm_compile.training.data import load_split
from flashnorm_compile.training.loop import PrivateRun, StepRecord, accuracy
from flashnorm_compile.training.models import DigitsNet

# Three steps an epoch.
TINY = ["train", "--noise-multiplier", "4", "--batch-size", "480", "--seed", "7",
        "--lowering", "eager", "--device", "cpu"]  # fmt: skip


def run(*arguments: str | Path) -> Result:
    # As in a process of its own: the same seed gives the same noise.
    with repeat_noise():
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: str | Path) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def metrics_in(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "metrics.json").read_text("utf-8"))
    return loaded


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Arrange that something happens during a step, before its noise is drawn."""

    def arrange(number: int, action: Callable[[], None]) -> None:
        original = PrivateRun._step

        def step(self: PrivateRun, indices: list[int]) -> StepRecord:
            if len(self.steps) + 1 == number:
                action()
            return original(self, indices)

        monkeypatch.setattr(PrivateRun, "_step", step)

    return arrange


def test_a_run_writes_what_it_promises(tmp_path: Path) -> None:
    shown = succeed(*TINY, "--epochs", "2", "--output-dir", tmp_path).output
    for words in ("private", "not private", "cost of privacy", "ε at δ = 1e-5", "Test accuracy"):
        assert words in shown
    assert "--seed 7 makes the noise repeatable" in shown
    assert {path.name for path in tmp_path.iterdir()} == {
        "curve.png", "metrics.json", "model.pt", "checkpoint.pt"}  # fmt: skip

    written = metrics_in(tmp_path)
    expected = PrivacyAccountant()
    expected.record(noise_multiplier=4.0, sampling_rate=480 / 1437, count=6)
    privacy = written["privacy"]
    assert privacy["epsilon"] == pytest.approx(expected.epsilon(1e-5))
    assert privacy["epsilon"] == written["epochs"][-1]["epsilon"]
    assert (privacy["delta"], privacy["noise_multiplier"], privacy["steps"]) == (1e-5, 4.0, 6)
    assert privacy["sampling_rate"] == 480 / 1437
    assert f"{privacy['epsilon']:.2f}" in shown
    assert [epoch["steps"] for epoch in written["epochs"]] == [3, 6]
    assert written["finished"] is True
    assert written["versions"]["torch"] == torch.__version__
    assert written["config"]["epsilon"] is None
    assert written["model"]["class"] == "DigitsNet"
    assert len(written["result"]["test_accuracy_by_class"]) == 10
    assert written["baseline"]["epochs"] == 2
    assert 0.5 < written["baseline"]["test_accuracy"] <= 1.0
    assert written["timings"]["first_step_seconds"] >= written["timings"]["median_step_seconds"]
    assert "do not cover" in written["note"]

    assert stat.S_IMODE((tmp_path / "checkpoint.pt").stat().st_mode) == 0o600
    model, split = DigitsNet(), load_split()
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    measured = accuracy(model, split.test_x, split.test_y)
    assert measured == pytest.approx(written["result"]["test_accuracy"])


def test_a_target_epsilon_sets_the_noise(tmp_path: Path) -> None:
    succeed("train", "--epsilon", "2", "--delta", "1e-4", "--batch-size", "480", "--epochs", "1",
            "--lowering", "eager", "--no-baseline", "--output-dir", tmp_path)  # fmt: skip
    written = metrics_in(tmp_path)
    assert 1.99 < written["privacy"]["epsilon"] <= 2.0
    assert written["baseline"] is None
    assert written["config"]["seed"] is None
    assert written["privacy"]["repeatable_noise"] is False


def test_resuming_for_more_epochs_equals_one_long_run(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(*TINY, "--epochs", "3", "--no-baseline", "--output-dir", whole)
    succeed(*TINY, "--epochs", "1", "--no-baseline", "--output-dir", parts)
    succeed("train", "--resume", parts / "checkpoint.pt", "--epochs", "3", "--no-baseline")

    same_result(parts, whole)


def test_ctrl_c_keeps_what_is_done(
    tmp_path: Path, at_step: Callable[[int, Callable[[], None]], None]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(*TINY, "--epochs", "2", "--no-baseline", "--output-dir", whole)
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped = run(*TINY, "--epochs", "2", "--output-dir", parts)

    assert stopped.exit_code == 130
    assert "Stopped after step 4 of 6" in stopped.output
    assert f"--resume {parts / 'checkpoint.pt'}" in stopped.output
    partial = metrics_in(parts)
    assert partial["finished"] is False
    assert partial["privacy"]["steps"] == 4
    assert len(partial["epochs"]) == 1
    assert partial["baseline"] is None
    assert (parts / "curve.png").exists()

    succeed("train", "--resume", parts / "checkpoint.pt", "--no-baseline")
    same_result(parts, whole)


def same_result(folder: Path, other: Path) -> None:
    """Check that two runs ended alike, up to rounding and time."""
    ours, theirs = metrics_in(folder), metrics_in(other)
    assert ours["privacy"] == theirs["privacy"]
    for mine, its in zip(ours["epochs"], theirs["epochs"], strict=True):
        del mine["seconds"], its["seconds"]
        assert mine == pytest.approx(its, rel=1e-4)
    weights = [torch.load(each / "model.pt", weights_only=True) for each in (folder, other)]
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--epsilon", "3", "--noise-multiplier", "1"], "were both given or both left out"),
        (["--epsilon", "0"], "--epsilon is 0.0; expected a number above 0"),
        (["--delta", "2"], "--delta is 2.0; expected a number between 0 and 1"),
        (["--batch-size", "5000"], "--batch-size is 5000, but there are 1437 training samples"),
        (["--epochs", "0"], "--epochs is 0; expected at least 1"),
        (["--resume", "nowhere/checkpoint.pt"], "--resume: there is no file nowhere/checkpoint.pt"),
        (["--optimizer", "lbfgs"], "lbfgs"),
    ],
)
def test_bad_options_are_explained(options: list[str], expected: str, tmp_path: Path) -> None:
    result = run("train", *options, "--output-dir", tmp_path / "out")
    assert result.exit_code == 2
    assert expected in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("train", "--device", "cuda")
    assert result.exit_code == 2
    assert "--device is cuda, but torch" in result.output
    assert "use cpu" in result.output


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("train", "--output-dir", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "--output-dir: " in result.output
    assert "cannot be created: Not a directory" in result.output


def test_a_resumed_run_keeps_its_settings(tmp_path: Path) -> None:
    succeed(*TINY, "--epochs", "1", "--no-baseline", "--output-dir", tmp_path)
    saved = tmp_path / "checkpoint.pt"
    changed = run("train", "--resume", saved, "--lr", "0.1")
    assert changed.exit_code == 2
    assert "--lr is 0.1, but the run to be resumed has 0.5" in changed.output
    # What agrees with the checkpoint may be repeated; a finished run only writes its files anew.
    again = succeed(*TINY, "--resume", saved, "--no-baseline")
    assert metrics_in(tmp_path)["privacy"]["steps"] == 3
    assert "3 private steps" in again.output


def test_a_refused_step_is_reported_without_a_traceback(
    tmp_path: Path, at_step: Callable[[int, Callable[[], None]], None]
) -> None:
    def refuse() -> None:
        raise PrivacyError("the gradient of model.weight mixes samples")

    at_step(1, refuse)
    result = run(*TINY, "--epochs", "1", "--output-dir", tmp_path)
    assert result.exit_code == 1
    assert "Error: the gradient of model.weight mixes samples" in result.output


def test_info_shows_versions_devices_and_the_backend() -> None:
    shown = succeed("info").output
    for words in ("torch", torch.__version__, "dp-accounting", "CUDA", '"flashnorm"', "registered"):
        assert words in shown


def test_info_fails_if_torch_does_not_find_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "list_backends", lambda: ["inductor"])
    result = run("info")
    assert result.exit_code == 1
    assert 'torch.compile does not find the backend "flashnorm"' in result.output


def test_no_command_shows_help() -> None:
    result = run()
    assert "train" in result.output
    assert "info" in result.output
