"""The gradients that a right step leaves, by a loop over samples in eager mode.

The reference knows nothing of graphs, hooks or vmap: the gradient of sample i is that of the loss
on a batch that holds sample i alone, under the same autocast. All samples are looped over, at the
measured sizes, so that the compiled code that is checked is the code that is timed.

How far two right results may lie apart is measured too: bf16 rounds every matrix product's
operands and results, and a batch of one is rounded otherwise than a batch of many.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from methods import Settings, cross_entropy
from torch import Tensor, nn

#: This many samples' norms set C, so that about half of the samples are clipped.
SAMPLES_FOR_BOUND = 8
#: Samples in a batch, when rounding is measured.
CHUNK = 8


@dataclass(frozen=True)
class Reference:
    """Per-sample norms [B] and the gradients that a right step leaves.

    Attributes:
        max_grad_norm: C.
        norms: n_i.
        gradients: Σ c_i g_i / B; c_i = 1 for a step without privacy.
        batched: the same by ordinary batches of samples, in eager mode: another right result.
        norm_rounding: largest relative difference of a norm under autocast from that in float32,
            among the first samples; 0 without autocast.
    """

    max_grad_norm: float
    norms: Tensor
    gradients: dict[str, Tensor]
    batched: dict[str, Tensor]
    norm_rounding: float


def make_reference(
    model: nn.Module, inputs: Tensor, targets: Tensor, settings: Settings, *, private: bool
) -> Reference:
    """Loop over the samples."""
    count = len(inputs)
    rounded = [norm for norm, _ in _samples(model, inputs, targets, settings, SAMPLES_FOR_BOUND)]
    bound = statistics.median(rounded)
    rounding = 0.0
    if settings.autocast:
        exactly = dataclasses.replace(settings, autocast=False)
        exact = [norm for norm, _ in _samples(model, inputs, targets, exactly, SAMPLES_FOR_BOUND)]
        pairs = zip(rounded, exact, strict=True)
        rounding = max(abs(ours / theirs - 1.0) for ours, theirs in pairs)
    norms, factors = [], []
    sums = {name: torch.zeros_like(p) for name, p in _trained(model).items()}
    for norm, gradients in _samples(model, inputs, targets, settings, count):
        norms.append(norm)
        factors.append(min(1.0, bound / (norm + 1e-6)) if private else 1.0)
        for name, gradient in gradients.items():
            sums[name].add_(gradient, alpha=factors[-1] / count)
    batched = _in_batches(model, inputs, targets, settings, torch.tensor(factors))
    return Reference(bound, torch.tensor(norms), sums, batched, rounding)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _samples(
    model: nn.Module, inputs: Tensor, targets: Tensor, settings: Settings, count: int
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    trained = _trained(model)
    for i in range(min(count, len(inputs))):
        with settings.precision():
            loss = cross_entropy(model(inputs[i : i + 1]), targets[i : i + 1])
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        found = {
            name: gradient.float()
            for name, gradient in zip(trained, gradients, strict=True)
            if gradient is not None
        }
        norms = torch.stack([gradient.norm() for gradient in found.values()])
        yield float(norms.double().norm()), found


def _in_batches(
    model: nn.Module, inputs: Tensor, targets: Tensor, settings: Settings, factors: Tensor
) -> dict[str, Tensor]:
    """Return Σ c_i g_i / B, as the gradient of Σ c_i loss_i / B in batches of a few samples."""
    weights = (factors / len(factors)).to(inputs.device)
    trained = _trained(model)
    for x, y, weight in zip(
        inputs.split(CHUNK), targets.split(CHUNK), weights.split(CHUNK), strict=True
    ):
        with settings.precision():
            logits = model(x)
            losses = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
        (losses.view(len(y), -1).float().mean(1) * weight).sum().backward()
    found = {name: p.grad for name, p in trained.items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
