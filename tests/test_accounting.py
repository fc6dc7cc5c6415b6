"""The accountant agrees with dp_accounting, with the closed form, and survives a checkpoint."""

import json
import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from scipy import optimize, stats

from flashnorm_compile.accounting import PrivacyAccountant, Releases, noise_multiplier_for

DELTA = 1e-5


def accountant(*releases):
    result = PrivacyAccountant()
    for sigma, rate, count in releases:
        result.record(noise_multiplier=sigma, sampling_rate=rate, count=count)
    return result


def epsilon_of(*releases, delta=DELTA):
    return accountant(*releases).epsilon(delta)


def dp_accounting_epsilon(*releases):
    direct = PLDAccountant()
    for sigma, rate, count in releases:
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        direct.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), count)
    return direct.get_epsilon(DELTA)


def gaussian_delta(epsilon, sigma):
    """δ of the Gaussian mechanism of sensitivity 1 (Balle and Wang 2018, theorem 8)."""
    upper = stats.norm.cdf(1 / (2 * sigma) - epsilon * sigma)
    lower = stats.norm.cdf(-1 / (2 * sigma) - epsilon * sigma)
    return upper - math.exp(epsilon) * lower


class TestEpsilon:
    @pytest.mark.parametrize(
        "releases",
        [
            [(1.0, 0.01, 1000)],
            [(2.0, 0.5, 10)],
            [(1.0, 0.01, 100), (1.5, 0.02, 50), (1.0, 0.01, 20)],
        ],
    )
    def test_is_that_of_dp_accounting(self, releases):
        assert epsilon_of(*releases) == pytest.approx(dp_accounting_epsilon(*releases), rel=1e-6)

    @pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
    def test_of_one_full_batch_is_the_closed_form(self, sigma):
        exact = optimize.brentq(lambda e: gaussian_delta(e, sigma) - DELTA, 1e-6, 100)
        assert epsilon_of((sigma, 1.0, 1)) == pytest.approx(exact, rel=1e-4)
        assert epsilon_of((sigma * 3, 1.0, 9)) == pytest.approx(exact, rel=1e-4)

    @pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
    def test_delta_is_the_inverse(self, epsilon):
        full_batch = accountant((1.0, 1.0, 1))
        assert full_batch.delta(epsilon) == pytest.approx(gaussian_delta(epsilon, 1.0), rel=1e-3)
        sampled = accountant((1.0, 0.01, 500))
        assert sampled.delta(sampled.epsilon(DELTA)) == pytest.approx(DELTA, rel=1e-3)

    def test_grows_with_steps_and_rate_and_falls_with_noise_and_delta(self):
        base = epsilon_of((1.0, 0.01, 100))
        assert epsilon_of((1.0, 0.01, 101)) > base
        assert epsilon_of((1.0, 0.011, 100)) > base
        assert epsilon_of((1.1, 0.01, 100)) < base
        assert epsilon_of((1.0, 0.01, 100), delta=1e-4) < base
        assert epsilon_of((1.0, 0.01, 100), (5.0, 0.01, 1)) > base

    def test_order_of_recording_does_not_matter(self):
        first, second = (1.0, 0.01, 100), (1.5, 0.02, 50)
        assert epsilon_of(first, second) == pytest.approx(epsilon_of(second, first), rel=1e-9)

    def test_counts_what_is_recorded_after_a_query(self):
        steps = accountant((1.0, 0.01, 100))
        before = steps.epsilon(DELTA)
        steps.record(noise_multiplier=1.0, sampling_rate=0.01, count=100)
        assert steps.epsilon(DELTA) == epsilon_of((1.0, 0.01, 200)) > before

    def test_is_zero_before_the_first_release(self):
        assert PrivacyAccountant().epsilon(DELTA) == 0.0
        assert PrivacyAccountant().delta(1.0) == 0.0

    @pytest.mark.parametrize("sigma", [0.0, 1e-300])
    def test_is_infinite_for_good_once_a_release_had_no_noise(self, sigma):
        steps = accountant((1.0, 0.01, 10), (sigma, 0.01, 1), (1.0, 0.01, 10))
        assert steps.epsilon(DELTA) == math.inf
        assert steps.delta(1e6) == 1.0

    def test_of_very_small_noise_takes_a_coarse_grid_instead_of_gigabytes(self):
        loss = 1 / (2 * 0.01**2)
        assert loss < epsilon_of((0.01, 0.5, 1)) < 2 * loss


class TestHistory:
    def test_merges_runs_of_equal_releases(self):
        steps = accountant((1.0, 0.01, 3), (1.0, 0.01, 2), (1.0, 0.02, 1), (1.0, 0.01, 1))
        assert steps.history == (
            Releases(1.0, 0.01, 5),
            Releases(1.0, 0.02, 1),
            Releases(1.0, 0.01, 1),
        )

    def test_goes_through_json(self):
        steps = accountant((1.0, 0.01, 30), (0.7, 0.013, 1))
        restored = PrivacyAccountant()
        restored.load_state_dict(json.loads(json.dumps(steps.state_dict())))
        assert restored.history == steps.history
        assert restored.epsilon(DELTA) == steps.epsilon(DELTA)

    def test_is_never_forgotten_by_loading(self):
        steps = accountant((1.0, 0.01, 30))
        with pytest.raises(ValueError, match="has recorded 30 releases, which loading"):
            steps.load_state_dict(PrivacyAccountant().state_dict())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 2}, r"state\['version'\] is 2; expected 1"),
            ({"neighbours": "replace_one"}, "'replace_one'; expected 'add_or_remove_one'"),
            (
                {"history": [{"noise_multiplier": -1, "sampling_rate": 0.1, "count": 1}]},
                "noise_multiplier is -1",
            ),
        ],
    )
    def test_of_another_kind_is_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            PrivacyAccountant().load_state_dict(PrivacyAccountant().state_dict() | change)

    def test_missing_from_the_state_is_refused(self):
        state = PrivacyAccountant().state_dict()
        del state["history"]
        with pytest.raises(ValueError, match="state has no 'history'"):
            PrivacyAccountant().load_state_dict(state)


class TestCalibration:
    @pytest.mark.parametrize(
        ("target", "rate", "steps"), [(3.0, 0.01, 1000), (0.5, 1.0, 10), (50.0, 0.2, 5)]
    )
    def test_result_meets_the_target_closely_and_never_exceeds_it(self, target, rate, steps):
        sigma = noise_multiplier_for(
            target_epsilon=target, delta=DELTA, sampling_rate=rate, steps=steps
        )
        assert 0.999 * target < epsilon_of((sigma, rate, steps)) <= target

    @pytest.mark.parametrize("sigma", [0.125, 0.25, 1.0])
    def test_inverts_epsilon(self, sigma):
        target = epsilon_of((sigma, 1.0, 1))
        found = noise_multiplier_for(target_epsilon=target, delta=DELTA, sampling_rate=1.0, steps=1)
        assert found == pytest.approx(sigma, rel=1e-3)

    def test_out_of_reach_targets_are_explained(self):
        with pytest.raises(ValueError, match="even a noise multiplier of 1048576 does not reach"):
            noise_multiplier_for(target_epsilon=1e-9, delta=1e-9, sampling_rate=1.0, steps=10)
        with pytest.raises(ValueError, match=r"a noise multiplier of 0\.015625 gives"):
            noise_multiplier_for(target_epsilon=1e6, delta=1e-5, sampling_rate=1.0, steps=1)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0; expected a finite number >= 0"),
            ({"noise_multiplier": math.nan}, "noise_multiplier is nan"),
            ({"noise_multiplier": math.inf}, "noise_multiplier is inf"),
            ({"sampling_rate": 0.0}, "sampling_rate is 0.0; expected 0 < sampling_rate <= 1"),
            ({"sampling_rate": 1.5}, "sampling_rate is 1.5"),
            ({"sampling_rate": math.nan}, "sampling_rate is nan"),
            ({"count": 0}, "count is 0; expected an int >= 1"),
            ({"count": 1.5}, "count is 1.5; expected an int >= 1"),
        ],
    )
    def test_of_record_leave_no_trace(self, change, message):
        steps = PrivacyAccountant()
        with pytest.raises(ValueError, match=message):
            steps.record(**({"noise_multiplier": 1.0, "sampling_rate": 0.1, "count": 1} | change))
        assert steps.history == ()

    @pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
    def test_of_queries_name_the_argument(self, delta):
        with pytest.raises(ValueError, match=r"delta is .*; expected 0 < delta < 1"):
            PrivacyAccountant().epsilon(delta)
        with pytest.raises(ValueError, match=r"epsilon is -1; expected a finite number >= 0"):
            PrivacyAccountant().delta(-1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"target_epsilon": 0.0}, "target_epsilon is 0.0; expected a finite number > 0"),
            ({"delta": 2.0}, "delta is 2.0"),
            ({"sampling_rate": 2.0}, "sampling_rate is 2.0"),
            ({"steps": 0}, "steps is 0; expected an int >= 1"),
        ],
    )
    def test_of_calibration_name_the_argument(self, change, message):
        valid = {"target_epsilon": 1.0, "delta": DELTA, "sampling_rate": 0.1, "steps": 10}
        with pytest.raises(ValueError, match=message):
            noise_multiplier_for(**(valid | change))
