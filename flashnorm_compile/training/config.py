"""What a run is asked to do, and the sampling and noise that follow from it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flashnorm_compile.accounting import PrivacyAccountant, noise_multiplier_for

OptimizerName = Literal["sgd", "adam"]
Lowering = Literal["inductor", "eager"]

DEFAULT_EPSILON = 3.0
DEFAULT_LEARNING_RATES: Mapping[str, float] = {"sgd": 0.5, "adam": 0.02}


class ConfigError(ValueError):
    """An option that does not fit; the message says which, and what would."""


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a private run.

    Attributes:
        epsilon: target ε after the last epoch; None if ``noise_multiplier`` is given.
        noise_multiplier: σ; None to compute it from ``epsilon``.
        delta: δ at which ε is stated.
        max_grad_norm: C.
        batch_size: expected batch size; sampling rate × training samples.
        epochs: passes of about N / batch_size steps.
        learning_rate: step size.
        optimizer: "sgd" (momentum 0.9) or "adam".
        seed: makes the run repeatable, and its noise predictable; None for a private run.
        lowering: how the rewritten graphs run.
    """

    epsilon: float | None = DEFAULT_EPSILON
    noise_multiplier: float | None = None
    delta: float = 1e-5
    max_grad_norm: float = 0.3
    batch_size: int = 360
    epochs: int = 30
    learning_rate: float = DEFAULT_LEARNING_RATES["sgd"]
    optimizer: OptimizerName = "sgd"
    seed: int | None = None
    lowering: Lowering = "inductor"

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ConfigError(
                "--epsilon and --noise-multiplier were both given or both left out; give one. "
                "--epsilon computes the noise, --noise-multiplier sets it"
            )
        for name in ("epsilon", "noise_multiplier", "max_grad_norm", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{option(name)} is {value}; expected a number above 0")
        if not 0 < self.delta < 1:
            raise ConfigError(f"--delta is {self.delta}; expected a number between 0 and 1")
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{option(name)} is {getattr(self, name)}; expected at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed is {self.seed}; expected an integer from 0 to 2**63 - 1")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the inverse of ``TrainConfig(**data)``."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PrivacyPlan:
    """The releases of a run.

    Attributes:
        noise_multiplier: σ.
        sampling_rate: q, the probability with which a sample is in a batch.
        steps_per_epoch: releases in an epoch.
        steps: releases in the run.
        epsilon: ε after all of them.
    """

    noise_multiplier: float
    sampling_rate: float
    steps_per_epoch: int
    steps: int
    epsilon: float


def plan_privacy(config: TrainConfig, num_samples: int) -> PrivacyPlan:
    """Work out sampling rate, number of steps and noise.

    Raises:
        ConfigError: the batch is larger than the data set, or no noise gives the ε asked for.
    """
    if config.batch_size > num_samples:
        raise ConfigError(
            f"--batch-size is {config.batch_size}, but there are {num_samples} training samples; "
            f"expected at most {num_samples}"
        )
    rate = config.batch_size / num_samples
    steps_per_epoch = max(1, round(num_samples / config.batch_size))
    steps = steps_per_epoch * config.epochs
    sigma = config.noise_multiplier
    if sigma is None:
        assert config.epsilon is not None
        try:
            sigma = noise_multiplier_for(
                target_epsilon=config.epsilon, delta=config.delta, sampling_rate=rate, steps=steps
            )
        except ValueError as error:
            raise ConfigError(f"--epsilon is {config.epsilon}: {error}") from error
    epsilon = planned_epsilon(sigma, rate, steps, config.delta)
    return PrivacyPlan(sigma, rate, steps_per_epoch, steps, epsilon)


def extend(config: TrainConfig, plan: PrivacyPlan, epochs: int) -> tuple[TrainConfig, PrivacyPlan]:
    """Return the run with another number of epochs and the noise that it has.

    Raises:
        ConfigError: the target ε would be exceeded.
    """
    steps = plan.steps_per_epoch * epochs
    epsilon = planned_epsilon(plan.noise_multiplier, plan.sampling_rate, steps, config.delta)
    if config.epsilon is not None and epochs > config.epochs and epsilon > config.epsilon:
        raise ConfigError(
            f"--epochs is {epochs}, which would cost ε = {epsilon:.2f}, but this run's target is "
            f"ε = {config.epsilon:g}: its noise was computed for {config.epochs} epochs. Start a "
            "new run for more epochs"
        )
    return (
        dataclasses.replace(config, epochs=epochs),
        dataclasses.replace(plan, steps=steps, epsilon=epsilon),
    )


def planned_epsilon(sigma: float, sampling_rate: float, steps: int, delta: float) -> float:
    """Return ε after a number of equal steps."""
    accountant = PrivacyAccountant()
    accountant.record(noise_multiplier=sigma, sampling_rate=sampling_rate, count=steps)
    return accountant.epsilon(delta)


def option(name: str) -> str:
    """Return how a setting is spelled on the command line."""
    return "--lr" if name == "learning_rate" else "--" + name.replace("_", "-")


def delta_text(delta: float) -> str:
    """Return δ as people write it: 1e-5, not 1e-05."""
    return re.sub(r"e-0+", "e-", f"{delta:g}")
