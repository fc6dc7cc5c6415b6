"""Runs one case of a zoo through the backend and through the oracle, and compares the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from oracle import (
    TOLERANCES,
    OracleResult,
    SampleGradients,
    assert_matches_oracle,
    sample_gradients,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import flashnorm_compile as fn
from flashnorm_compile.passes.plan import Plan

STRATEGIES = ("auto", "materialize", "ghost")
#: Differs from every batch size in the zoos: dividing by the actual batch size would show.
EXPECTED_BATCH_SIZE = 9
SEED = 1234


@dataclass(frozen=True)
class Case:
    """A model, a batch and a loss.

    Attributes:
        name: the test's id.
        model: builds the model (the random seed is fixed before).
        inputs: from a batch size to the batch: a tuple (passed by position after the model) or a
            dict (passed by keyword).
        loss: ``loss(model, *inputs)``, a scalar.
        loss_reduction: "mean" or "sum", how the loss treats the batch.
        in_dims: batch axes by name, for inputs that are a dict; None is axis 0 everywhere.
        batch_size: how many samples.
        precision: a row of ``oracle.TOLERANCES``.
        device: where model and batch are.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    loss: Callable[..., Tensor]
    loss_reduction: str = "mean"
    in_dims: Any = None
    batch_size: int = 4
    precision: str = "float32"
    device: str = "cpu"

    def build_model(self) -> nn.Module:
        torch.manual_seed(SEED)
        return self.model().to(self.device)

    def build_batch(self, batch_size: int | None = None) -> Any:
        torch.manual_seed(SEED + 1)
        batch = self.inputs(self.batch_size if batch_size is None else batch_size)
        return pytree.tree_map(self._moved, batch)

    def _moved(self, leaf: Any) -> Any:
        return leaf.to(self.device) if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class PrivateResult:
    """What one private step left behind, and the step."""

    loss: Any
    norms: Tensor
    factors: Tensor
    nonfinite_samples: int
    grads: dict[str, Tensor | None]
    step: Any

    @property
    def plan(self) -> Plan:
        return self.step.plan


class Zoo(dict[str, Case]):
    """Cases by name."""

    def add(
        self,
        name: str,
        model: Callable[[], nn.Module],
        inputs: Callable[[int], Any],
        loss: Callable[..., Tensor],
        **options: Any,
    ) -> None:
        if name in self:
            raise ValueError(f"two cases named {name}")
        self[name] = Case(name, model, inputs, loss, **options)


def call(function: Callable[..., Any], model: Any, batch: Any) -> Any:
    """Call with the batch by position, or by keyword if it is a dict."""
    if isinstance(batch, Mapping):
        return function(model, **batch)
    return function(model, *batch)


def make_step(loss_fn: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return an ordinary training step for a loss."""

    def step(model, *args, **kwargs):
        loss = loss_fn(model, *args, **kwargs)
        loss.backward()
        return loss.detach()

    return step


def private_step(
    loss_fn: Callable[..., Tensor],
    *,
    max_grad_norm: float = 1.0,
    strategy: str = "auto",
    lowering: str = "eager",
    **options: Any,
) -> Any:
    """Return the noiseless private version of a loss's training step."""
    settings = {
        "noise_multiplier": 0.0,
        "expected_batch_size": EXPECTED_BATCH_SIZE,
        "loss_reduction": "mean",
    } | options
    decorate = fn.dp_step(
        max_grad_norm=max_grad_norm, strategy=strategy, lowering=lowering, **settings
    )
    return decorate(make_step(loss_fn))


def run_private(
    case: Case,
    strategy: str,
    lowering: str,
    *,
    max_grad_norm: float = 1.0,
    batch: Any = None,
    **options: Any,
) -> PrivateResult:
    """Run one private step of a case on a fresh model."""
    model = case.build_model()
    step = private_step(
        case.loss,
        max_grad_norm=max_grad_norm,
        strategy=strategy,
        lowering=lowering,
        loss_reduction=case.loss_reduction,
        in_dims=None if case.in_dims is None else {"kwargs": case.in_dims},
        **options,
    )
    return read_result(
        step, model, call(step, model, case.build_batch() if batch is None else batch)
    )


def read_result(step: Any, model: nn.Module, loss: Any) -> PrivateResult:
    """Collect what a private step reports and left in ``.grad``."""
    return PrivateResult(
        loss=loss,
        norms=step.per_sample_norms,
        factors=step.clipping_factors,
        nonfinite_samples=step.nonfinite_samples,
        grads=gradients_of(model),
        step=step,
    )


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: param.grad for name, param in model.named_parameters()}


def run_oracle(case: Case, batch: Any = None) -> SampleGradients:
    """Run the oracle on a fresh model."""
    model = case.build_model()
    return model_oracle(
        model, case.loss, case.build_batch() if batch is None else batch, in_dims=case.in_dims
    )


def model_oracle(
    model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, *, in_dims: Any = None
) -> SampleGradients:
    """Run the oracle on a model; every sample meets the buffers as they were at the start."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss_of(sample: Any) -> Tensor:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if not torch.equal(buffer, saved[name]):
                    buffer.copy_(saved[name])
        return call(loss_fn, model, sample)

    return sample_gradients(
        loss_of,
        dict(model.named_parameters()),
        batch,
        in_dims=0 if in_dims is None else in_dims,
    )


def clip(gradients: SampleGradients, max_grad_norm: float, loss_reduction: str) -> OracleResult:
    return gradients.clip(
        max_grad_norm=max_grad_norm,
        expected_batch_size=EXPECTED_BATCH_SIZE,
        loss_reduction=loss_reduction,
    )


def bound_that_clips_some(norms: Tensor) -> float:
    """Return a clipping bound with samples on either side (if there are two different norms)."""
    finite = norms[torch.isfinite(norms)].sort().values
    if not len(finite) or float(finite[-1]) == 0.0:
        return 1.0
    middle = len(finite) // 2
    low = finite[middle - 1] if middle else finite[middle] / 2
    return float((low + finite[middle]) / 2)


def check_every_strategy(case: Case) -> None:
    """Check a case with each strategy; where no norm has a choice they are the same graph."""
    plan = check_case(case, "ghost")
    if any("ghost" in row.choices for row in plan.rows):
        check_case(case, "materialize")


def check_case(case: Case, strategy: str, lowering: str = "eager", **options: Any) -> Plan:
    """Assert that the private step gives the oracle's norms, factors and gradients.

    The returned loss must be that of the plain step on the whole batch.

    Returns:
        What was decided.
    """
    batch = case.build_batch()
    per_sample = run_oracle(case, batch)
    bound = bound_that_clips_some(per_sample.norms)
    expected = clip(per_sample, bound, case.loss_reduction)
    actual = run_private(case, strategy, lowering, max_grad_norm=bound, batch=batch, **options)
    assert_matches_oracle(
        expected,
        norms=actual.norms,
        factors=actual.factors,
        grads=actual.grads,
        precision=case.precision,
    )
    assert actual.nonfinite_samples == int((~torch.isfinite(expected.norms)).sum())
    plain = call(case.loss, case.build_model(), batch).detach()
    tolerance = TOLERANCES[case.precision].loss
    torch.testing.assert_close(
        actual.loss, plain, rtol=tolerance, atol=tolerance, equal_nan=True
    )
    return actual.plan
