"""Handwritten digits that scikit-learn ships: 1797 grey images of 8×8 pixels, ten classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NAME = "scikit-learn digits"
CLASSES = 10
TEST_FRACTION = 0.2
SPLIT_SEED = 0

_BRIGHTEST_PIXEL = 16.0


@dataclass(frozen=True)
class Split:
    """Training and test images and labels.

    Attributes:
        train_x: [N, 1, 8, 8] float32 in [0, 1].
        train_y: [N] int64.
        test_x: [M, 1, 8, 8] float32 in [0, 1].
        test_y: [M] int64.
    """

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @property
    def num_train(self) -> int:
        """N, the number of training samples."""
        return len(self.train_y)

    def to(self, device: torch.device) -> Split:
        """Return the split on a device."""
        return Split(
            self.train_x.to(device),
            self.train_y.to(device),
            self.test_x.to(device),
            self.test_y.to(device),
        )


def load_split() -> Split:
    """Return the same stratified split every time: 1437 training and 360 test samples.

    Pixels are scaled by a constant. Statistics of the data (mean, variance) are not used: they
    would be a release of their own.
    """
    digits = load_digits()
    images = torch.tensor(digits.images / _BRIGHTEST_PIXEL, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(),
        test_size=TEST_FRACTION,
        stratify=digits.target,
        random_state=SPLIT_SEED,
    )
    return Split(images[train], labels[train], images[test], labels[test])
