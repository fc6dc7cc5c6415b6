"""``metrics.json``: what was run, what it cost, how well it did."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashnorm_compile.accounting import NEIGHBOURS
from flashnorm_compile.training import data
from flashnorm_compile.training.baseline import BaselineResult
from flashnorm_compile.training.loop import AVERAGE_DECAY, PrivateRun, StepRecord

VERSION = 1
_PACKAGES = ("flashnorm-compile", "torch", "dp-accounting", "numpy", "scikit-learn", "triton")

NOT_COVERED = (
    "ε and δ cover the weights in model.pt. They do not cover the losses, clipping fractions, "
    "accuracies and the baseline, which are measured on the data as they are, nor the choice of "
    "the default hyper-parameters, which were tuned on splits of the training data."
)


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def collect(run: PrivateRun, baseline: BaselineResult | None) -> dict[str, Any]:
    """Return the metrics as plain data."""
    train_accuracy, test_accuracy = run.evaluate()
    return {
        "version": VERSION,
        "note": NOT_COVERED,
        "finished": run.finished,
        "config": run.config.to_dict(),
        "versions": versions(),
        "privacy": _privacy(run),
        "data": {
            "name": data.NAME,
            "train_samples": run.split.num_train,
            "test_samples": len(run.split.test_y),
        },
        "model": {
            "class": type(run.model).__name__,
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "average_decay": AVERAGE_DECAY,
        },
        "result": {
            "train_accuracy": train_accuracy,
            "test_accuracy": test_accuracy,
            "test_accuracy_by_class": _accuracy_by_class(run),
        },
        "baseline": None if baseline is None else asdict(baseline),
        "epochs": [asdict(record) for record in run.epochs],
        "timings": _timings(run.steps),
        "device": str(run.split.train_x.device),
    }


def write(path: Path, metrics: dict[str, Any]) -> None:
    """Write metrics as standard JSON: an infinite ε becomes null."""
    path.write_text(
        json.dumps(_finite(metrics), indent=2, allow_nan=False, ensure_ascii=False) + "\n", "utf-8"
    )


def _privacy(run: PrivateRun) -> dict[str, Any]:
    return {
        "epsilon": run.epsilon,
        "delta": run.config.delta,
        "noise_multiplier": run.plan.noise_multiplier,
        "sampling_rate": run.plan.sampling_rate,
        "expected_batch_size": run.config.batch_size,
        "max_grad_norm": run.config.max_grad_norm,
        "steps": len(run.steps),
        "planned_steps": run.plan.steps,
        "planned_epsilon": run.plan.epsilon,
        "accountant": "privacy loss distributions, Poisson sampling",
        "neighbours": NEIGHBOURS,
        "repeatable_noise": run.config.seed is not None,
    }


def _accuracy_by_class(run: PrivateRun) -> list[float]:
    correct = run.averaged.module(run.split.test_x).argmax(dim=1) == run.split.test_y
    return [
        correct[run.split.test_y == label].double().mean().item() for label in range(data.CLASSES)
    ]


def _timings(steps: list[StepRecord]) -> dict[str, float | None]:
    """The first steps compile; the median is that of a compiled step."""
    seconds = [record.seconds for record in steps]
    return {
        "train_seconds": sum(seconds),
        "first_step_seconds": seconds[0] if seconds else None,
        "median_step_seconds": statistics.median(seconds) if seconds else None,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
