"""The private training loop; its state can be saved after any step and continued."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flashnorm_compile.accounting import PrivacyAccountant
from flashnorm_compile.sampling import PoissonBatchSampler
from flashnorm_compile.step import dp_step
from flashnorm_compile.training.config import PrivacyPlan, TrainConfig
from flashnorm_compile.training.data import Split
from flashnorm_compile.training.models import DigitsNet

MOMENTUM = 0.9
AVERAGE_DECAY = 0.9


@dataclass(frozen=True)
class StepRecord:
    """What one step looked like; None where the batch was empty.

    Attributes:
        loss: mean loss of the batch.
        clip_fraction: share of samples whose gradient was clipped.
        nonfinite_samples: samples left out because their gradient was not finite.
        seconds: wall-clock time, compilation included.
    """

    loss: float | None
    clip_fraction: float | None
    nonfinite_samples: int
    seconds: float


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch ended with; accuracies are those of the averaged weights.

    Attributes:
        epoch: number of epochs done.
        steps: number of steps done since the start of the run.
        epsilon: ε spent since the start of the run.
        loss: mean over the epoch's non-empty batches, None without any.
        clip_fraction: mean over the epoch's non-empty batches, None without any.
        nonfinite_samples: sum over the epoch.
        train_accuracy: share of training samples classified correctly.
        test_accuracy: share of test samples classified correctly.
        seconds: wall-clock time of the epoch's steps.
    """

    epoch: int
    steps: int
    epsilon: float
    loss: float | None
    clip_fraction: float | None
    nonfinite_samples: int
    train_accuracy: float
    test_accuracy: float
    seconds: float


class PrivateRun:
    """A private training run.

    The weights it reports are an exponential moving average of the released ones, which is
    post-processing and costs no privacy.

    Args:
        config: the settings.
        plan: noise and sampling rate that follow from them.
        split: the data, on the device to train on.
    """

    def __init__(self, config: TrainConfig, plan: PrivacyPlan, split: Split) -> None:
        self.config = config
        self.plan = plan
        self.split = split
        self.model = initial_model(config.seed).to(split.train_x.device)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
        self.optimizer = make_optimizer(config, self.model)
        self.accountant = PrivacyAccountant()
        self.sampler = PoissonBatchSampler(
            split.num_train, plan.sampling_rate, plan.steps_per_epoch, _generator(config.seed)
        )
        self.step = dp_step(
            training_step,
            max_grad_norm=config.max_grad_norm,
            noise_multiplier=plan.noise_multiplier,
            expected_batch_size=config.batch_size,
            seed=config.seed,
            lowering=config.lowering,
            accountant=self.accountant,
            sampling_rate=plan.sampling_rate,
        )
        self.steps: list[StepRecord] = []
        self.epochs: list[EpochRecord] = []

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.epochs) >= self.config.epochs

    @property
    def epsilon(self) -> float:
        """ε spent so far at the run's δ."""
        return self.accountant.epsilon(self.config.delta)

    def train(
        self,
        *,
        on_step: Callable[[StepRecord], None],
        on_epoch: Callable[[EpochRecord], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Train the epochs that are left.

        Args:
            on_step: called after every step.
            on_epoch: called after every epoch.
            should_stop: asked after every step; the run can be continued from there.
        """
        while not self.finished and not should_stop():
            for indices in self.sampler:
                on_step(self._step(indices))
                if should_stop():
                    break
            if len(self.steps) == (len(self.epochs) + 1) * self.plan.steps_per_epoch:
                self.epochs.append(self._finish_epoch())
                on_epoch(self.epochs[-1])

    def evaluate(self) -> tuple[float, float]:
        """Return training and test accuracy of the averaged weights."""
        model, split = self.averaged.module, self.split
        return (
            accuracy(model, split.train_x, split.train_y),
            accuracy(model, split.test_x, split.test_y),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue. It holds the secret seeds of noise and batches."""
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "accountant": self.accountant.state_dict(),
            "sampler": self.sampler.state_dict(),
            "noise": self.step.state_dict(),
            "steps": [asdict(record) for record in self.steps],
            "epochs": [asdict(record) for record in self.epochs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.accountant.load_state_dict(state["accountant"])
        self.sampler.load_state_dict(state["sampler"])
        self.step.load_state_dict(state["noise"])
        self.steps = [StepRecord(**record) for record in state["steps"]]
        self.epochs = [EpochRecord(**record) for record in state["epochs"]]

    def _step(self, indices: list[int]) -> StepRecord:
        start = time.perf_counter()
        batch = torch.tensor(indices, dtype=torch.int64, device=self.split.train_x.device)
        x, y = self.split.train_x[batch], self.split.train_y[batch]
        loss = self.step(self.model, self.optimizer, x, y)
        self.averaged.update_parameters(self.model)
        clipped = self.step.clipping_factors < 1
        record = StepRecord(
            loss=loss.item() if indices else None,
            clip_fraction=clipped.float().mean().item() if indices else None,
            nonfinite_samples=self.step.nonfinite_samples,
            seconds=time.perf_counter() - start,
        )
        self.steps.append(record)
        return record

    def _finish_epoch(self) -> EpochRecord:
        records = self.steps[-self.plan.steps_per_epoch :]
        train_accuracy, test_accuracy = self.evaluate()
        return EpochRecord(
            epoch=len(self.epochs) + 1,
            steps=len(self.steps),
            epsilon=self.epsilon,
            loss=_mean([record.loss for record in records]),
            clip_fraction=_mean([record.clip_fraction for record in records]),
            nonfinite_samples=sum(record.nonfinite_samples for record in records),
            train_accuracy=train_accuracy,
            test_accuracy=test_accuracy,
            seconds=sum(record.seconds for record in records),
        )


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Take an ordinary training step: nothing in it knows about privacy."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def initial_model(seed: int | None) -> DigitsNet:
    """Return a model with fresh weights; torch's global random state is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        return DigitsNet()


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a run."""
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=MOMENTUM)


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the share of samples classified correctly."""
    return (model(x).argmax(dim=1) == y).double().mean().item()


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
