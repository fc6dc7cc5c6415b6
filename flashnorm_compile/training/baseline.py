"""The same model trained without privacy, to see what privacy costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashnorm_compile.training.data import Split
from flashnorm_compile.training.loop import MOMENTUM, accuracy, initial_model, training_step

LEARNING_RATE = 0.1
BATCH_SIZE = 64


@dataclass(frozen=True)
class BaselineResult:
    """What the baseline ended with.

    Attributes:
        epochs: passes over the training samples.
        train_accuracy: share of training samples classified correctly.
        test_accuracy: share of test samples classified correctly.
        seconds: wall-clock time.
    """

    epochs: int
    train_accuracy: float
    test_accuracy: float
    seconds: float


def train_baseline(
    split: Split,
    *,
    epochs: int,
    seed: int,
    on_epoch: Callable[[], None],
    should_stop: Callable[[], bool],
) -> BaselineResult | None:
    """Train as one would without privacy: shuffled batches of 64, momentum, nothing clipped.

    Its step size and batch size are its own: those of the private run suit clipped gradients.

    Returns:
        The result, or None if ``should_stop`` asked to stop before the end.
    """
    start = time.perf_counter()
    device = split.train_x.device
    model = initial_model(seed).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(split.num_train, generator=generator).to(device)
        for batch in order.split(BATCH_SIZE):
            training_step(model, optimizer, split.train_x[batch], split.train_y[batch])
        on_epoch()
        if should_stop():
            return None
    return BaselineResult(
        epochs=epochs,
        train_accuracy=accuracy(model, split.train_x, split.train_y),
        test_accuracy=accuracy(model, split.test_x, split.test_y),
        seconds=time.perf_counter() - start,
    )
