"""Privacy accounting: what the recorded releases cost in (ε, δ).

A thin layer over Google's ``dp_accounting``: privacy loss distributions (Koskela, Jälkö and
Honkela, AISTATS 2020; Doroshenko et al., "Connect the dots", PoPETs 2022) of the Poisson-subsampled
Gaussian mechanism. Two data sets are neighbours if one has one sample more than the other. The
numbers hold only if every batch is drawn by Poisson sampling: `sampling.PoissonBatchSampler`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pld

STATE_VERSION = 1
NEIGHBOURS = "add_or_remove_one"

_FINEST_INTERVAL = 1e-4
_SIGMA_OF_FINEST_INTERVAL = 0.3
_SMALLEST_ACCOUNTED_SIGMA = 2.0**-20
_SMALLEST_CALIBRATED_SIGMA, _LARGEST_CALIBRATED_SIGMA = 2.0**-6, 2.0**20
_CALIBRATION_TOLERANCE = 1e-4
_CALIBRATION_COARSENING = 4


@dataclasses.dataclass(frozen=True)
class Releases:
    """A run of equal releases: Gaussian sums over Poisson-sampled batches.

    Attributes:
        noise_multiplier: σ, the noise's standard deviation in units of the clipping norm.
        sampling_rate: q, the probability with which each sample joins a batch.
        count: number of releases.
    """

    noise_multiplier: float
    sampling_rate: float
    count: int = 1

    def __post_init__(self) -> None:
        _check_noise_multiplier(self.noise_multiplier)
        _check_sampling_rate(self.sampling_rate)
        _check_count("count", self.count)


class PrivacyAccountant:
    """Adds up the privacy cost of a training run.

    Example:
        >>> accountant = PrivacyAccountant()
        >>> accountant.record(noise_multiplier=1.0, sampling_rate=0.01, count=1000)
        >>> round(accountant.epsilon(delta=1e-5), 2)
        1.83
    """

    def __init__(self) -> None:
        self._history: list[Releases] = []
        self._composed: pld.PrivacyLossDistribution | None = None

    @property
    def history(self) -> tuple[Releases, ...]:
        """The releases in the order of recording, equal neighbours merged into one entry."""
        return tuple(self._history)

    def record(self, *, noise_multiplier: float, sampling_rate: float, count: int = 1) -> None:
        """Record releases. To be called before the noised result can be read by anyone.

        Args:
            noise_multiplier: σ; 0 makes ε infinite for the rest of the run.
            sampling_rate: q in (0, 1]; 1 is the plain Gaussian mechanism.
            count: number of equal releases.

        Raises:
            ValueError: an argument is out of range; nothing is recorded then.
        """
        new = Releases(noise_multiplier, sampling_rate, count)
        last = self._history[-1] if self._history else None
        if last is not None and dataclasses.replace(last, count=count) == new:
            self._history[-1] = dataclasses.replace(last, count=last.count + count)
        else:
            self._history.append(new)
        self._composed = None

    def epsilon(self, delta: float) -> float:
        """Return the smallest ε known to hold at δ; 0 before the first release, inf if none holds.

        Args:
            delta: δ in (0, 1).
        """
        _check_delta(delta)
        if not self._history:
            return 0.0
        if self._is_not_private():
            return math.inf
        return float(self._compose().get_epsilon_for_delta(delta))

    def delta(self, epsilon: float) -> float:
        """Return the smallest δ known to hold at ε; 0 before the first release.

        Args:
            epsilon: ε >= 0.
        """
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise ValueError(f"epsilon is {epsilon}; expected a finite number >= 0")
        if not self._history:
            return 0.0
        if self._is_not_private():
            return 1.0
        return float(self._compose().get_delta_for_epsilon(epsilon))

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain data that JSON can hold."""
        return {
            "version": STATE_VERSION,
            "neighbours": NEIGHBOURS,
            "history": [dataclasses.asdict(releases) for releases in self._history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the history of `state_dict`.

        Raises:
            ValueError: the state is not one of this class and version, or this accountant has
                recorded releases already, which loading would forget.
        """
        if self._history:
            spent = sum(releases.count for releases in self._history)
            raise ValueError(
                f"this accountant has recorded {spent} releases, which loading a state would "
                "forget; load it into a new PrivacyAccountant"
            )
        for name, expected in (("version", STATE_VERSION), ("neighbours", NEIGHBOURS)):
            if state.get(name) != expected:
                raise ValueError(f"state[{name!r}] is {state.get(name)!r}; expected {expected!r}")
        if "history" not in state:
            raise ValueError("state has no 'history'; expected the result of state_dict()")
        self._history = [Releases(**releases) for releases in state["history"]]
        self._composed = None

    def _is_not_private(self) -> bool:
        """Whether a release had no noise, or so little (ε beyond 1e11) that it counts as none."""
        sigmas = (releases.noise_multiplier for releases in self._history)
        return any(sigma < _SMALLEST_ACCOUNTED_SIGMA for sigma in sigmas)

    def _compose(self) -> pld.PrivacyLossDistribution:
        """Return the privacy loss distribution of the whole history, computed once a change."""
        if self._composed is None:
            interval = _interval(min(releases.noise_multiplier for releases in self._history))
            total: Counter[tuple[float, float]] = Counter()
            for releases in self._history:
                total[releases.noise_multiplier, releases.sampling_rate] += releases.count
            composed = pld.identity(interval)
            for (sigma, rate), count in total.items():
                composed = composed.compose(_self_composed(sigma, rate, count, interval))
            self._composed = composed
        return self._composed


def noise_multiplier_for(
    *, target_epsilon: float, delta: float, sampling_rate: float, steps: int
) -> float:
    """Return about the smallest noise multiplier with which a run keeps to (ε, δ).

    Args:
        target_epsilon: ε > 0, never exceeded by the result.
        delta: δ in (0, 1).
        sampling_rate: q in (0, 1].
        steps: number of releases.

    Returns:
        σ, above the optimum by about 1e-4 of its value. Takes some seconds.

    Raises:
        ValueError: an argument is out of range, or no σ in [2**-6, 2**20] gives this ε.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ValueError(f"target_epsilon is {target_epsilon}; expected a finite number > 0")
    _check_delta(delta)
    _check_sampling_rate(sampling_rate)
    _check_count("steps", steps)

    def interval(sigma: float) -> float:
        return _CALIBRATION_COARSENING * _interval(sigma)

    def epsilon(sigma: float) -> float:
        composed = _self_composed(sigma, sampling_rate, steps, interval(sigma))
        return float(composed.get_epsilon_for_delta(delta))

    setting = f"delta={delta}, sampling_rate={sampling_rate}, steps={steps}"
    upper = 1.0
    while epsilon(upper) > target_epsilon:
        upper *= 2
        if upper > _LARGEST_CALIBRATED_SIGMA:
            raise ValueError(
                f"target_epsilon is {target_epsilon}; with {setting} even a noise multiplier of "
                f"{_LARGEST_CALIBRATED_SIGMA:.0f} does not reach it. Allow more, or take fewer "
                "steps or a lower sampling rate"
            )
    lower = upper / 2
    while epsilon(lower) <= target_epsilon:
        upper, lower = lower, lower / 2
        if lower < _SMALLEST_CALIBRATED_SIGMA:
            raise ValueError(
                f"target_epsilon is {target_epsilon}; with {setting} a noise multiplier of "
                f"{upper} gives {epsilon(upper):.4g} already. Expected a target below that"
            )

    return float(
        dp_accounting.calibrate_dp_mechanism(
            lambda: PLDAccountant(value_discretization_interval=interval(lower)),
            lambda sigma: _event(sigma, sampling_rate, steps),
            target_epsilon,
            delta,
            # Beyond `upper`, where the grid of `lower`, if coarser, can give a larger ε.
            dp_accounting.ExplicitBracketInterval(lower, 1.1 * upper),
            tol=_CALIBRATION_TOLERANCE * lower,
        )
    )


def _event(sigma: float, rate: float, count: int) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(sigma)
    once = gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    return dp_accounting.SelfComposedDpEvent(once, count)


def _self_composed(
    sigma: float, rate: float, count: int, interval: float
) -> pld.PrivacyLossDistribution:
    """Return the privacy loss distribution of ``count`` equal releases."""
    if rate == 1:
        return _distribution(sigma / math.sqrt(count), 1.0, interval)
    return _distribution(sigma, rate, interval).self_compose(count)


@functools.lru_cache(maxsize=64)
def _distribution(sigma: float, rate: float, interval: float) -> pld.PrivacyLossDistribution:
    """Return the privacy loss distribution of one release; it takes a second for a small σ."""
    return pld.from_gaussian_mechanism(
        standard_deviation=sigma, sampling_prob=rate, value_discretization_interval=interval
    )


def _interval(sigma: float) -> float:
    """Return the grid spacing of the privacy loss for releases of noise multiplier ``sigma``.

    The loss spans about 1 / 2σ², so a fixed grid takes gigabytes for a small σ. Doubling keeps the
    grids nested: a coarser one never gives a smaller ε.
    """
    doublings = math.ceil(2 * math.log2(_SIGMA_OF_FINEST_INTERVAL / sigma))
    return _FINEST_INTERVAL * 2.0 ** max(0, doublings)


def _check_noise_multiplier(value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"noise_multiplier is {value}; expected a finite number >= 0")


def _check_sampling_rate(value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"sampling_rate is {value}; expected 0 < sampling_rate <= 1")


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected an int >= 1")


def _check_delta(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"delta is {value}; expected 0 < delta < 1")
