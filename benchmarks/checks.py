"""Is the measured step right? A loop over samples, in eager mode, decides.

The reference knows nothing of graphs, hooks or vmap: the gradient of sample i is that of the loss
on a batch that holds sample i alone, under the same autocast. All samples are looped over, at the
measured sizes, so that the compiled code that is checked is the code that is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from methods import Method, Settings, cross_entropy
from torch import Tensor, nn

#: Largest relative error of the whole gradient (flat, L2), of each per-sample norm, and of each
#: parameter's gradient (beyond NEGLIGIBLE of the whole: a key bias's true gradient is zero).
#:
#: bf16 autocast rounds every matrix product's operands and result (2**-9 = 0.002 each), and the
#: two sides round differently: other kernels, a batch of one, fused or not. On one sample's
#: gradient that gives errors near 0.02; the samples' gradients cancel in the sum (the labels are
#: random) while their errors do not, so that the sum of 16 is off by 0.07, for the plain compiled
#: step and for Opacus as well ("gradient error" in the table). In a norm such errors average out,
#: and its limit is the sharp one: a missing cross term, factor or sample is off by far more.
#: float32 differs in summation order only.
TOLERANCES = {"bf16": (0.15, 1e-2, 0.6), "fp32": (1e-3, 1e-3, 1e-2)}
NEGLIGIBLE = 1e-3
#: Ours may find norms above the true ones, on purpose: where bf16 products could round by more
#: than a norm shows, the norm is raised to a bound that no contribution exceeds
#: (passes/sites/rounding.py). By 1.3 % for a sample of 512 tokens at d=2048.
SURPLUS = {"bf16": 0.03, "fp32": 0.0}
#: Of the noise's standard deviation; the smallest model here has 29 000 parameters: 0.4 %.
NOISE_TOLERANCE = 0.03
#: This many samples' norms set C, so that about half of the samples are clipped.
SAMPLES_FOR_BOUND = 4


@dataclass(frozen=True)
class Reference:
    """Per-sample norms [B] and the gradients that a right step leaves.

    Attributes:
        max_grad_norm: C.
        norms: n_i.
        clipped: Σ c_i g_i / B.
        plain: Σ g_i / B.
    """

    max_grad_norm: float
    norms: Tensor
    clipped: dict[str, Tensor]
    plain: dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What the check found; errors are relative."""

    passed: bool
    gradient_error: float
    norm_error: float | None
    reason: str = ""


def make_reference(
    model: nn.Module, inputs: Tensor, targets: Tensor, settings: Settings, *, private: bool
) -> Reference:
    """Loop over the samples."""
    first = [norm for norm, _ in _samples(model, inputs, targets, settings, SAMPLES_FOR_BOUND)]
    bound = statistics.median(first)
    norms = []
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for norm, gradients in _samples(model, inputs, targets, settings, len(inputs)):
        norms.append(norm)
        factor = min(1.0, bound / (norm + 1e-6)) if private else 1.0
        for name, gradient in gradients.items():
            sums[name].add_(gradient, alpha=factor / len(inputs))
    return Reference(bound, torch.tensor(norms), sums if private else {}, {} if private else sums)


def _samples(
    model: nn.Module, inputs: Tensor, targets: Tensor, settings: Settings, count: int
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
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


def compare(reference: Reference, method: Method) -> Verdict:
    """Compare the last noiseless step with the reference."""
    precision = "bf16" if method.settings.autocast else "fp32"
    gradient_tolerance, norm_tolerance, parameter_tolerance = TOLERANCES[precision]
    expected = reference.clipped if method.private else reference.plain
    actual = method.gradients()
    absent = sorted(n for n in expected.keys() - actual.keys() if expected[n].any())
    unknown = sorted(actual.keys() - expected.keys())
    if absent or unknown:
        return Verdict(
            False, float("nan"), None, f"gradients missing: {absent}, not expected: {unknown}"
        )
    gradient_error, each, most = _relative_errors(expected, actual)
    worst = max(each, key=lambda name: each[name])
    norm_error = _norm_error(reference.norms, method.norms(), SURPLUS[precision])
    reason = ""
    # Written so that NaN fails.
    if not gradient_error <= gradient_tolerance:
        found = f"gradient off by {gradient_error:.2g} (limit {gradient_tolerance})"
        reason = f"{found}, most in {most}"
    elif not each[worst] <= parameter_tolerance:
        reason = f"gradient of {worst} off by {each[worst]:.2g} (limit {parameter_tolerance})"
    elif norm_error is not None and not norm_error <= norm_tolerance:
        reason = f"per-sample norm off by {norm_error:.2g} (limit {norm_tolerance})"
    return Verdict(not reason, gradient_error, norm_error, reason)


def _relative_errors(
    expected: dict[str, Tensor], actual: dict[str, Tensor]
) -> tuple[float, dict[str, float], str]:
    """Of the whole gradient, of each parameter's, and the parameter that adds most to the whole."""
    names = [name for name in expected if name in actual]
    differences = torch.stack([(actual[n].float() - expected[n]).norm() for n in names]).double()
    scales = torch.stack([expected[n].norm() for n in names]).double()
    whole = scales.norm()
    each = ((differences - NEGLIGIBLE * whole).clamp(min=0) / scales).nan_to_num(float("inf"))
    # 0/0: a gradient that is zero, and found to be.
    each = torch.where(differences <= NEGLIGIBLE * whole, 0.0, each)
    by_name = dict(zip(names, each.tolist(), strict=True))
    return float(differences.norm() / whole), by_name, names[int(differences.argmax())]


def _norm_error(expected: Tensor, actual: Tensor | None, surplus: float) -> float | None:
    """Return the largest relative error of the norms, those above by no more than the surplus 0."""
    if actual is None:
        return None
    actual = actual.detach().float().flatten().cpu()
    if actual.shape != expected.shape:
        return float("inf")
    error = (actual - expected) / expected
    return float(torch.maximum(-error, error - surplus).clamp(min=0).max())


def noise_ratio(method: Method, max_grad_norm: float) -> float:
    """Return the noise's measured standard deviation over σC/B, at σ = 1."""
    method.set_privacy(max_grad_norm, 0.0)
    method.prepare()
    method.run()
    clean = {name: gradient.clone() for name, gradient in method.gradients().items()}
    method.set_privacy(max_grad_norm, 1.0)
    method.prepare()
    method.run()
    squares, count = 0.0, 0
    for name, noisy in method.gradients().items():
        squares += float((noisy - clean[name]).double().square().sum())
        count += noisy.numel()
    return (squares / count) ** 0.5 / (max_grad_norm / method.workload.batch_size)
