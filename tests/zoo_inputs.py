"""Batches and losses that many cases share. Batch sizes are arguments, never constants here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Inputs = Callable[[int], Any]


def regression(*features: int, targets: tuple[int, ...]) -> Inputs:
    """Return x [B, *features] and y [B, *targets]."""
    return lambda size: (torch.randn(size, *features), torch.randn(size, *targets))


def classification(*features: int, classes: int) -> Inputs:
    """Return x [B, *features] and labels [B]."""
    return lambda size: (torch.randn(size, *features), torch.randint(classes, (size,)))


def tokens(length: int, vocab: int) -> Inputs:
    """Return ids [B, T] and labels [B, T]."""
    return lambda size: (
        torch.randint(vocab, (size, length)),
        torch.randint(vocab, (size, length)),
    )


def tokens_to_class(length: int, vocab: int, classes: int) -> Inputs:
    """Return ids [B, T] and labels [B]."""
    return lambda size: (torch.randint(vocab, (size, length)), torch.randint(classes, (size,)))


def mse(model, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def squares(model, x: Tensor) -> Tensor:
    """Return a loss that needs no target."""
    return model(x).flatten(1).square().mean()


def cross_entropy(model, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def token_cross_entropy(model, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean over B·T tokens of logits [B, T, V]."""
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


def only_x(*features: int) -> Inputs:
    return lambda size: (torch.randn(size, *features),)
