"""``flashnorm train``: from settings to the files of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flashnorm_compile.training import checkpoint, figure, metrics
from flashnorm_compile.training.baseline import BaselineResult, train_baseline
from flashnorm_compile.training.config import (
    DEFAULT_LEARNING_RATES,
    ConfigError,
    TrainConfig,
    extend,
    option,
    plan_privacy,
)
from flashnorm_compile.training.console import describe_plan, progress_bar, results_table
from flashnorm_compile.training.data import Split, load_split
from flashnorm_compile.training.interrupt import StopRequest, stop_on_interrupt
from flashnorm_compile.training.loop import EpochRecord, PrivateRun

DEFAULT_OUTPUT = Path("runs/digits")
INTERRUPTED = 130


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        settings: the run's settings that were given; others take their defaults, or the
            checkpoint's values.
        device: "auto", "cpu" or "cuda".
        output_dir: where the files go; None for the default, or the checkpoint's folder.
        resume: a checkpoint to continue, or None.
        baseline: whether to train the reference without privacy.
    """

    settings: Mapping[str, Any]
    device: str = "auto"
    output_dir: Path | None = None
    resume: Path | None = None
    baseline: bool = True

    @property
    def folder(self) -> Path:
        """Where the files go."""
        if self.output_dir is not None:
            return self.output_dir
        return DEFAULT_OUTPUT if self.resume is None else self.resume.parent


def execute(request: Request, console: Console) -> int:
    """Train, write the files, show the result.

    Returns:
        The exit status: 0, or 130 after Ctrl-C (what was done by then is kept).

    Raises:
        ConfigError: a setting does not fit.
    """
    # On 8×8 images threads wait for each other longer than they work.
    torch.set_num_threads(1)
    split = load_split().to(resolve_device(request.device))
    run = prepare(request, split)
    make_folder(request.folder)
    console.print(describe_plan(run.config, run.plan, split.num_train))

    def announce() -> None:
        console.print("Stopping after this step; Ctrl-C once more stops at once.")

    with stop_on_interrupt(announce) as stop:
        _train(run, request.folder, console, stop)
        baseline = None
        if request.baseline and not stop():
            baseline = _train_baseline(run, console, stop)
    _write_files(request.folder, run, baseline)
    console.print(results_table(run, baseline))
    console.print(metrics.NOT_COVERED, style="dim")
    names = "curve.png, metrics.json, model.pt and checkpoint.pt (secret: it holds the noise seed)"
    console.print(f"Written to {request.folder}: {names}", soft_wrap=True)
    if stop():
        console.print(
            f"Stopped after step {len(run.steps)} of {run.plan.steps}. "
            f"To go on: flashnorm train --resume {request.folder / 'checkpoint.pt'}",
            soft_wrap=True,
        )
        return INTERRUPTED
    return 0


def prepare(request: Request, split: Split) -> PrivateRun:
    """Return a new run, or the one of the checkpoint.

    Raises:
        ConfigError: a setting does not fit, by itself or with the checkpoint.
    """
    if request.resume is None:
        config = new_config(request.settings)
        return PrivateRun(config, plan_privacy(config, split.num_train), split)
    saved = checkpoint.load(request.resume)
    config, plan = saved.config, saved.plan
    _refuse_changes(request.settings, config)
    if "epochs" in request.settings:
        config, plan = extend(config, plan, request.settings["epochs"])
    run = PrivateRun(config, plan, split)
    run.load_state_dict(saved.state)
    return run


def new_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a new run, completed by defaults that depend on each other."""
    completed = dict(settings)
    if "noise_multiplier" in settings and "epsilon" not in settings:
        completed["epsilon"] = None
    if "learning_rate" not in settings and "optimizer" in settings:
        completed["learning_rate"] = DEFAULT_LEARNING_RATES[settings["optimizer"]]
    return TrainConfig(**completed)


def resolve_device(name: str) -> torch.device:
    """Return the device to train on.

    Raises:
        ConfigError: there is no CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        build = "was built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        raise ConfigError(f"--device is cuda, but torch {torch.__version__} {build}; use cpu")
    return torch.device(name)


def make_folder(folder: Path) -> None:
    """Create the output folder.

    Raises:
        ConfigError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output-dir: {folder} cannot be created: {error.strerror}") from error


def _refuse_changes(settings: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse settings other than the checkpoint's; the number of epochs and lowering may differ.

    The noise stream is continued. With other settings the noise of a step that was done before
    and is done again would serve two different updates, whose difference holds no noise.
    """
    for name, value in settings.items():
        saved = getattr(config, name)
        if name not in ("epochs", "lowering") and value != saved:
            raise ConfigError(
                f"{option(name)} is {value}, but the run to be resumed has {saved}. A resumed run "
                f"keeps its settings; leave {option(name)} out, or start a new run"
            )


def _train(run: PrivateRun, folder: Path, console: Console, stop: StopRequest) -> None:
    total, done = run.plan.steps, len(run.steps)
    with progress_bar(console, "private", total, done) as bar:

        def on_epoch(record: EpochRecord) -> None:
            bar.on_epoch(record)
            checkpoint.save(folder / "checkpoint.pt", run)

        run.train(on_step=bar.on_step, on_epoch=on_epoch, should_stop=stop)
    checkpoint.save(folder / "checkpoint.pt", run)


def _train_baseline(run: PrivateRun, console: Console, stop: StopRequest) -> BaselineResult | None:
    epochs = run.config.epochs
    with progress_bar(console, "not private", epochs) as bar:
        return train_baseline(
            run.split,
            epochs=epochs,
            seed=run.config.seed or 0,
            on_epoch=lambda: bar.progress.advance(bar.task),
            should_stop=stop,
        )


def _write_files(folder: Path, run: PrivateRun, baseline: BaselineResult | None) -> None:
    torch.save(run.averaged.module.state_dict(), folder / "model.pt")
    metrics.write(folder / "metrics.json", metrics.collect(run, baseline))
    figure.draw(folder / "curve.png", run.config, run.epochs, baseline)
