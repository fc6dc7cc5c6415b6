"""Is the measured step right? See ``reference.py`` for what it is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from methods import Method
from reference import Reference
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """Largest relative errors.

    Attributes:
        whole: of the whole gradient (flat, L2).
        norm: of each per-sample norm.
        parameter: of each parameter's gradient, beyond what is negligible.
        negligible: a share of the whole gradient; a key bias's true gradient is zero.
        surplus: by how much a norm may be above the true one on purpose: where bf16 products
            could round by more than a norm shows, it is raised to a bound that no contribution
            exceeds (passes/sites/rounding.py). By 1.3 % for a sample of 512 tokens at d=2048.
    """

    whole: float
    norm: float
    parameter: float
    negligible: float
    surplus: float


#: bf16 autocast rounds every matrix product's operands and result (2**-9 = 0.002 each), and the
#: two sides round differently: other kernels, a batch of one, fused or not. On one sample's
#: gradient that gives errors near 0.02; the samples' gradients cancel in the sum (the labels are
#: random) while their errors do not, so that the sum of 16 is off by 0.07, for the plain compiled
#: step and for Opacus as well ("gradient error" in the table). In a norm such errors average out,
#: and its limit is the sharp one: a missing cross term, factor or sample is off by far more.
#: float32 differs in summation order only.
LIMITS = {
    "bf16": Limits(whole=0.15, norm=1e-2, parameter=0.6, negligible=1e-3, surplus=0.03),
    "fp32": Limits(whole=1e-3, norm=1e-3, parameter=1e-2, negligible=1e-5, surplus=0.0),
}
#: Where rounding alone was seen to do more on this workload, the limit is so many times that.
OVER_ROUNDING = 2.0
#: Of the noise's standard deviation, or five of its own standard errors if those are more.
NOISE_TOLERANCE = 0.01


@dataclass(frozen=True)
class Verdict:
    """What the check found; errors are relative.

    Attributes:
        passed: whether all is within the limits.
        gradient_error: of the whole gradient.
        rounding: the same for ordinary batches in eager mode: what rounding alone costs.
        norm_error: the largest of a per-sample norm.
        reason: why it did not pass.
    """

    passed: bool
    gradient_error: float
    rounding: float
    norm_error: float | None
    reason: str = ""


@dataclass(frozen=True)
class _Errors:
    """Of the whole gradient, of each parameter's, and the parameter that adds most to the whole."""

    whole: float
    each: dict[str, float]
    most: str


def compare(reference: Reference, method: Method) -> Verdict:
    """Compare the last noiseless step with the reference."""
    limits = LIMITS["bf16" if method.settings.autocast else "fp32"]
    expected, actual = reference.gradients, method.gradients()
    floor = _errors(expected, reference.batched, limits.negligible)
    absent = sorted(n for n in expected.keys() - actual.keys() if expected[n].any())
    unknown = sorted(actual.keys() - expected.keys())
    if absent or unknown:
        reason = f"gradients missing: {absent}, not expected: {unknown}"
        return Verdict(False, float("nan"), floor.whole, None, reason)
    found = _errors(expected, actual, limits.negligible)
    norm_error = _norm_error(reference.norms, method.norms(), limits.surplus)
    whole = max(limits.whole, OVER_ROUNDING * floor.whole)
    norm = max(limits.norm, OVER_ROUNDING * reference.norm_rounding)
    each = {
        name: max(limits.parameter, OVER_ROUNDING * floor.each.get(name, 0.0))
        for name in found.each
    }
    # Written so that NaN fails.
    wrong = [name for name, error in found.each.items() if not error <= each[name]]
    reason = ""
    if not found.whole <= whole:
        reason = f"gradient off by {found.whole:.2g} (limit {whole:.2g}), most in {found.most}"
    elif wrong:
        name = max(wrong, key=lambda name: found.each[name])
        reason = f"gradient of {name} off by {found.each[name]:.2g} (limit {each[name]:.2g})"
    elif norm_error is not None and not norm_error <= norm:
        reason = f"per-sample norm off by {norm_error:.2g} (limit {norm:.2g})"
    return Verdict(not reason, found.whole, floor.whole, norm_error, reason)


def _errors(
    expected: dict[str, Tensor], actual: dict[str, Tensor], negligible: float
) -> _Errors:
    names = [name for name in expected if name in actual]
    differences = torch.stack([(actual[n].float() - expected[n]).norm() for n in names]).double()
    scales = torch.stack([expected[n].norm() for n in names]).double()
    whole = scales.norm()
    each = ((differences - negligible * whole).clamp(min=0) / scales).nan_to_num(float("inf"))
    # 0/0: a gradient that is zero, and found to be.
    each = torch.where(differences <= negligible * whole, 0.0, each)
    by_name = dict(zip(names, each.tolist(), strict=True))
    return _Errors(float(differences.norm() / whole), by_name, names[int(differences.argmax())])


def _norm_error(expected: Tensor, actual: Tensor | None, surplus: float) -> float | None:
    """Return the largest relative error of the norms, those above by no more than the surplus 0."""
    if actual is None:
        return None
    actual = actual.detach().float().flatten().cpu()
    if actual.shape != expected.shape:
        return float("inf")
    error = (actual - expected) / expected
    return float(torch.maximum(-error, error - surplus).clamp(min=0).max())


def noise_error(method: Method, max_grad_norm: float) -> tuple[float, str]:
    """Compare the noise's standard deviation with σC/B, at σ = 1.

    Returns:
        The ratio of the two, and why it is wrong ("" if it is not).
    """
    method.set_privacy(max_grad_norm, 0.0)
    method.clear()
    method.leave_gradients()
    clean = {name: gradient.clone() for name, gradient in method.gradients().items()}
    method.set_privacy(max_grad_norm, 1.0)
    method.clear()
    method.leave_gradients()
    squares, count = 0.0, 0
    for name, noisy in method.gradients().items():
        squares += float((noisy - clean[name]).double().square().sum())
        count += noisy.numel()
    ratio = (squares / count) ** 0.5 / (max_grad_norm / method.workload.batch_size)
    limit = max(NOISE_TOLERANCE, 5 / math.sqrt(2 * count))
    if abs(ratio - 1.0) <= limit:
        return ratio, ""
    return ratio, f"noise has {ratio:.3g} times the standard deviation that it must have"
