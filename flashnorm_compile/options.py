"""The options of the backend, validated once and frozen."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from flashnorm_compile.errors import PrivacyError

LossReduction = Literal["mean", "sum"]
Strategy = Literal["auto", "materialize", "ghost", "flash"]
Kernels = Literal["auto", "library", "fused"]
Lowering = Literal["inductor", "eager"]

_CHOICES: dict[str, tuple[object, ...]] = {
    "loss_reduction": ("mean", "sum"),
    "strategy": ("auto", "materialize", "ghost", "flash"),
    "kernels": ("auto", "library", "fused"),
    "lowering": ("inductor", "eager"),
    "loss_outside": (False, True),
}


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        max_grad_norm: C, the L2 bound on each sample's gradient over all trainable parameters.
        noise_multiplier: σ, the noise's standard deviation in units of C; 0 means clipping only.
        expected_batch_size: E, the mean size of a logical batch (sampling rate × data set size).
            Divides the noisy sum when ``loss_reduction="mean"``.
        loss_reduction: how the loss reduces over samples.
        loss_outside: a promise about what is not seen, where the compiled function is the model
            alone: the loss outside is computed for each sample from the sample's own outputs,
            and reduced over samples as ``loss_reduction`` says.
        in_dims: where the batch axis of each argument is, in vmap's convention: an int for all,
            or a tuple by position or a dict by argument name, of ints, None (not a batch
            argument) and nested containers. None means dim 0 of every tensor argument.
        strategy: how per-sample norms are computed; "auto" lets the cost model choose. Where a
            parameter's gradient does not allow what is asked for, the cost model chooses too.
        kernels: "library" computes norms and sums by torch's own operations; "fused" by kernels of
            this package, where there is one, written in Triton for GPUs; "auto" by these where they
            were measured to be faster. "flash" norms are always by these.
        memory_budget: bytes that "auto" may keep alive until the clipping factors are known, by
            the cost model; None is no limit: the fastest strategies.
        seed: reproduces the noise of a program that is run again; None draws one from the
            operating system. Two gradients under the same noise differ by their un-noised
            difference, so the steps made with one seed in one process draw different noise;
            ``flashnorm_compile.noise_streams.repeat_noise`` repeats a run inside one process.
            Runs in other processes are not seen: give runs on different data different seeds.
        lowering: "inductor" generates code; "eager" runs the rewritten graphs as they are.
    """

    max_grad_norm: float
    noise_multiplier: float
    expected_batch_size: float | None = None
    loss_reduction: LossReduction = "mean"
    loss_outside: bool = False
    in_dims: Any = None
    strategy: Strategy = "auto"
    kernels: Kernels = "auto"
    memory_budget: float | None = None
    seed: int | None = None
    lowering: Lowering = "inductor"

    def __post_init__(self) -> None:
        _require_number("max_grad_norm", self.max_grad_norm, positive=True)
        _require_number("noise_multiplier", self.noise_multiplier, positive=False)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise PrivacyError(
                    f"flashnorm option {name}={getattr(self, name)!r} is not valid; "
                    f"choose one of {', '.join(map(repr, choices))}."
                )
        if self.expected_batch_size is not None:
            _require_number("expected_batch_size", self.expected_batch_size, positive=True)
        elif self.loss_reduction == "mean":
            raise PrivacyError(
                'flashnorm needs the option expected_batch_size with loss_reduction="mean": the '
                "noisy sum is divided by the expected size of a logical batch, never by the "
                'actual one. Pass it, or loss_reduction="sum" for a summed loss.'
            )
        if self.memory_budget is not None:
            _require_number("memory_budget", self.memory_budget, positive=False)
        if self.seed is not None and (
            isinstance(self.seed, bool)
            or not isinstance(self.seed, int)
            or not 0 <= self.seed < 2**63
        ):
            raise PrivacyError(
                f"flashnorm option seed={self.seed!r} is not valid; "
                "it is an integer from 0 to 2**63 - 1, or None."
            )

    @property
    def divisor(self) -> float:
        """E of the update: the expected batch size for a mean loss, 1 for a summed one."""
        if self.loss_reduction == "sum" or self.expected_batch_size is None:
            return 1.0
        return float(self.expected_batch_size)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any] | None) -> Options:
        """Validate a user's mapping.

        Raises:
            PrivacyError: an option is unknown, missing or out of range.
        """
        given = dict(options or {})
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise PrivacyError(
                    f"flashnorm does not know the option {name!r}.{hint} "
                    f"Valid options: {', '.join(names)}."
                )
        for name, meaning in (
            ("max_grad_norm", "the norm to which each sample's gradient is clipped"),
            ("noise_multiplier", "σ; 0 means clipping without noise, which is not private"),
        ):
            if given.get(name) is None:
                raise PrivacyError(
                    f"flashnorm needs the option {name} ({meaning}); it has no default. "
                    f'Pass options={{"{name}": ...}}.'
                )
        return cls(**given)


def _require_number(name: str, value: Any, *, positive: bool) -> None:
    ok = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (value > 0 if positive else value >= 0)
    )
    if not ok:
        bound = "positive" if positive else "non-negative"
        raise PrivacyError(
            f"flashnorm option {name}={value!r} is not valid; it is a finite {bound} number."
        )
