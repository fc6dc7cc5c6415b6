"""The specification the backend is tested against: a loop over samples, in eager mode.

A sample's gradient is the gradient of the user's own loss function on a batch that holds this
sample alone (the batch axis is kept, its size is 1). Nothing here knows about graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Clipping divides by the norm plus this.
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors: of the whole gradient (flat), of each norm, of the loss."""

    gradient: float
    norm: float
    loss: float


TOLERANCES = {
    # Both sides are float32 and differ in summation order only: a few units of 2**-24, times the
    # mild cancellation of small models.
    "float32": Tolerance(gradient=1e-5, norm=1e-5, loss=1e-5),
    # Matrix products under autocast round their results to bfloat16 (2**-9 = 0.002 each), in
    # another order for a batch of one; norms and sums are float32, so errors average out.
    "autocast_bfloat16": Tolerance(gradient=2e-2, norm=1e-2, loss=1e-2),
    # As above, and every activation, loss term and the parameter's own .grad is bfloat16.
    "bfloat16": Tolerance(gradient=3e-2, norm=2e-2, loss=2e-2),
}


@dataclass(frozen=True)
class SampleGradients:
    """Every sample's own gradient, in float64: name -> [B, *parameter shape]."""

    by_name: dict[str, Tensor]
    norms: Tensor

    def clip(
        self, *, max_grad_norm: float, expected_batch_size: float, loss_reduction: str
    ) -> OracleResult:
        """Clip every sample's gradient to ``max_grad_norm``, sum, and scale."""
        finite = torch.isfinite(self.norms)
        factors = (max_grad_norm / (self.norms + NORM_EPSILON)).clamp(max=1.0)
        factors = torch.where(finite, factors, torch.zeros_like(factors))
        divisor = {"mean": expected_batch_size, "sum": 1.0}[loss_reduction]
        grads = {}
        for name, per_sample in self.by_name.items():
            clean = per_sample[finite]
            grads[name] = torch.einsum("b,b...->...", factors[finite], clean) / divisor
        return OracleResult(self.norms, factors, grads)


@dataclass(frozen=True)
class OracleResult:
    """What a private step must report: norms [B], clipping factors [B], gradients by name."""

    norms: Tensor
    factors: Tensor
    grads: dict[str, Tensor]


def batch_size_of(batch: Any, in_dims: Any = 0) -> int:
    """Return the one batch size that the tensors of ``batch`` agree on."""
    sizes = {leaf.shape[dim] for leaf, dim in _leaves(batch, in_dims) if dim is not None}
    if len(sizes) != 1:
        raise ValueError(f"batch sizes differ: {sorted(sizes)}")
    return sizes.pop()


def slice_sample(batch: Any, index: int, in_dims: Any = 0) -> Any:
    """Return ``batch`` with sample ``index`` alone; the batch axis stays, of size 1."""
    if isinstance(batch, Tensor):
        return batch if in_dims is None else batch.narrow(in_dims, index, 1)
    if isinstance(batch, Mapping):
        return {k: slice_sample(v, index, _child(in_dims, k)) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(slice_sample(v, index, _child(in_dims, k)) for k, v in enumerate(batch))
    return batch


def sample_gradients(
    loss_fn: Callable[[Any], Tensor],
    params: Mapping[str, Tensor],
    batch: Any,
    *,
    in_dims: Any = 0,
    accumulate_in_float64: bool = True,
) -> SampleGradients:
    """Run ``loss_fn`` on each sample alone and collect the gradients of ``params``.

    Args:
        loss_fn: from a batch (nested tuples, lists and dicts of tensors) to a scalar.
        params: those that require no gradient, or get none from any sample, are left out.
        batch: each tensor has the batch axis named by ``in_dims``.
        in_dims: an int or None for all of ``batch``, or a nesting that mirrors it.
        accumulate_in_float64: norms and sums in float64; else in float32.
    """
    dtype = torch.float64 if accumulate_in_float64 else torch.float32
    trainable = {name: param for name, param in params.items() if param.requires_grad}
    size = batch_size_of(batch, in_dims)
    rows: dict[str, list[Tensor | None]] = {name: [] for name in trainable}
    for index in range(size):
        loss = loss_fn(slice_sample(batch, index, in_dims))
        gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        for name, gradient in zip(trainable, gradients, strict=True):
            rows[name].append(None if gradient is None else gradient.detach().to(dtype))
    by_name = {
        name: torch.stack([torch.zeros_like(trainable[name], dtype=dtype) if g is None else g
                           for g in column])
        for name, column in rows.items()
        if any(g is not None for g in column)
    }
    squares = [g.reshape(size, -1).square().sum(1) for g in by_name.values()]
    norms = torch.stack(squares).sum(0).sqrt() if squares else torch.zeros(size, dtype=dtype)
    return SampleGradients(by_name, norms)


def per_sample_oracle(
    loss_fn: Callable[[Any], Tensor],
    params: Mapping[str, Tensor],
    batch: Any,
    *,
    max_grad_norm: float,
    expected_batch_size: float,
    loss_reduction: str,
    in_dims: Any = 0,
    accumulate_in_float64: bool = True,
) -> OracleResult:
    """Return what one noiseless private step on ``batch`` must give."""
    gradients = sample_gradients(
        loss_fn, params, batch, in_dims=in_dims, accumulate_in_float64=accumulate_in_float64
    )
    return gradients.clip(
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected_batch_size,
        loss_reduction=loss_reduction,
    )


def assert_matches_oracle(
    expected: OracleResult,
    *,
    norms: Tensor | None,
    factors: Tensor | None,
    grads: Mapping[str, Tensor | None],
    precision: str = "float32",
) -> None:
    """Compare a private step with the oracle.

    Args:
        expected: the oracle's result.
        norms: the step's ``per_sample_norms``; None where the entry point reports none.
        factors: the step's ``clipping_factors``; None likewise.
        grads: ``p.grad`` of every parameter, None for those without a gradient.
        precision: a row of ``TOLERANCES``.
    """
    tolerance = TOLERANCES[precision]
    present = {name for name, gradient in grads.items() if gradient is not None}
    assert present == set(expected.grads), (
        f"gradients on the wrong parameters: missing {sorted(set(expected.grads) - present)}, "
        f"unexpected {sorted(present - set(expected.grads))}"
    )
    if norms is not None:
        assert norms.shape == expected.norms.shape
        assert norms.dtype == torch.float32
        finite = torch.isfinite(expected.norms)
        assert torch.isfinite(norms).tolist() == finite.tolist(), f"norms {norms.tolist()}"
        _assert_vector("per-sample norms", norms[finite], expected.norms[finite], tolerance.norm)
    if factors is not None:
        assert factors.shape == expected.factors.shape
        _assert_vector("clipping factors", factors, expected.factors, tolerance.norm)
    error, worst = gradient_error(expected.grads, grads)
    assert error <= tolerance.gradient, f"gradient is off by {error:.3g} (relative); {worst}"


def gradient_error(
    expected: Mapping[str, Tensor], actual: Mapping[str, Tensor | None]
) -> tuple[float, str]:
    """Return the relative error of the whole gradient, and text on the worst parameters."""
    differences, scale = {}, 0.0
    for name, want in expected.items():
        got = actual[name]
        assert got is not None
        assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
        differences[name] = (got.to(want.dtype) - want).square().sum().item()
        scale += want.square().sum().item()
    total = sum(differences.values())
    worst = sorted(differences, key=lambda n: -differences[n])[:4]
    lines = [
        f"{n}: |difference| {differences[n] ** 0.5:.3g}, |expected| {expected[n].norm():.3g}"
        for n in worst
    ]
    if total == 0.0:
        return 0.0, ""
    error = (total / scale) ** 0.5 if scale else float("inf")
    return (error if error == error else float("inf")), "; ".join(lines)


def _assert_vector(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        actual.to(expected.dtype),
        expected,
        rtol=tolerance,
        atol=1e-7,
        msg=lambda text: f"{what}: got {actual.tolist()}, expected {expected.tolist()}\n{text}",
    )


def _child(in_dims: Any, key: Any) -> Any:
    if isinstance(in_dims, Mapping):
        return in_dims.get(key, 0)
    if isinstance(in_dims, Sequence):
        return in_dims[key]
    return in_dims


def _leaves(batch: Any, in_dims: Any) -> Iterator[tuple[Tensor, int | None]]:
    if isinstance(batch, Tensor):
        yield batch, in_dims
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _leaves(value, _child(in_dims, key))
    elif isinstance(batch, (tuple, list)):
        for index, value in enumerate(batch):
            yield from _leaves(value, _child(in_dims, index))
