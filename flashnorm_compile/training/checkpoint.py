"""Checkpoints: one file with all that a run needs to go on."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flashnorm_compile.training.config import ConfigError, PrivacyPlan, TrainConfig
from flashnorm_compile.training.loop import PrivateRun

VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A run as it was saved."""

    config: TrainConfig
    plan: PrivacyPlan
    state: dict[str, Any]


def save(path: Path, run: PrivateRun) -> None:
    """Write a checkpoint that only the owner can read: it holds the seeds of noise and batches.

    The old file stays until the new one is complete.
    """
    contents = {
        "version": VERSION,
        "config": run.config.to_dict(),
        "plan": asdict(run.plan),
        "state": run.state_dict(),
    }
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    torch.save(contents, partial)
    os.replace(partial, path)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ConfigError: there is no such file, or it is something else.
    """
    if not path.is_file():
        raise ConfigError(f"--resume: there is no file {path}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ConfigError(f"--resume: {path} is not a checkpoint that can be read") from error
    if not isinstance(contents, dict) or contents.get("version") != VERSION:
        raise ConfigError(f"--resume: {path} is not a checkpoint of this version ({VERSION})")
    return Checkpoint(
        TrainConfig(**contents["config"]), PrivacyPlan(**contents["plan"]), contents["state"]
    )
