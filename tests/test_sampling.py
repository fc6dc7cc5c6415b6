"""Poisson batches: their distribution, empty ones through a DataLoader, and resuming."""

import json
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from flashnorm_compile.sampling import EmptyBatchCollate, PoissonBatchSampler


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sampler(num_samples=50, sampling_rate=0.1, steps=20, seed=0):
    return PoissonBatchSampler(num_samples, sampling_rate, steps, seeded(seed))


class TestDistribution:
    N, Q, STEPS = 400, 0.07, 4000

    @pytest.fixture(scope="class")
    @classmethod
    def joined(cls):
        """Whether sample j joins batch t: [STEPS, N]."""
        joined = np.zeros((cls.STEPS, cls.N), dtype=bool)
        for t, batch in enumerate(PoissonBatchSampler(cls.N, cls.Q, cls.STEPS, seeded())):
            joined[t, batch] = True
        return joined

    def test_batch_sizes_are_binomial(self, joined):
        sizes = joined.sum(axis=1)
        edges = np.arange(18, 40)
        expected = np.diff(stats.binom.cdf(edges, self.N, self.Q), prepend=0, append=1)
        observed = np.bincount(np.searchsorted(edges, sizes), minlength=len(edges) + 1)
        assert stats.chisquare(observed, expected * self.STEPS).pvalue > 1e-3

    def test_every_sample_joins_at_the_sampling_rate(self, joined):
        counts = joined.sum(axis=0)
        pvalues = stats.binomtest(int(counts.sum()), joined.size, self.Q).pvalue
        assert pvalues > 1e-3
        z = (counts - self.STEPS * self.Q) / np.sqrt(self.STEPS * self.Q * (1 - self.Q))
        assert np.abs(z).max() < 5
        assert stats.kstest(z, "norm").pvalue > 1e-3

    def test_samples_and_steps_are_independent(self, joined):
        centred = joined - self.Q
        scale = self.Q * (1 - self.Q)
        for a, b in [(centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])]:
            assert abs((a * b).mean() / scale) < 5 / np.sqrt(a.size)

    def test_rate_one_takes_everything(self):
        assert list(sampler(5, 1.0, 2)) == [[0, 1, 2, 3, 4]] * 2

    def test_expected_batch_size(self):
        assert sampler(50, 0.1).expected_batch_size == pytest.approx(5.0)


class TestReproducibility:
    def test_equal_generators_give_equal_batches(self):
        assert list(sampler(seed=1)) == list(sampler(seed=1)) != list(sampler(seed=2))

    def test_without_a_generator_the_seed_is_new_whatever_the_global_one(self):
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            runs.append(list(PoissonBatchSampler(50, 0.5, 20)))
        assert runs[0] != runs[1]

    def test_a_second_pass_draws_new_batches(self):
        two_passes = sampler(steps=20)
        first, second = list(two_passes), list(two_passes)
        assert len(first) == len(second) == 20
        assert first != second
        assert first + second == list(sampler(steps=40))


class TestResume:
    def test_continues_in_the_middle_of_a_pass(self):
        full = list(sampler())
        interrupted = sampler()
        batches = iter(interrupted)
        head = [next(batches) for _ in range(7)]
        state = json.loads(json.dumps(interrupted.state_dict()))

        resumed = sampler(seed=99)
        resumed.load_state_dict(state)
        assert len(resumed) == 13
        assert head + list(resumed) == full
        assert len(resumed) == 20

    def test_can_go_back_to_the_steps_done_where_a_loader_drew_ahead(self):
        full = list(sampler())
        ahead = sampler()
        batches = iter(ahead)
        for _ in range(9):
            next(batches)
        resumed = sampler(seed=99)
        resumed.load_state_dict(ahead.state_dict(steps_done=7))
        assert list(resumed) == full[7:]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_samples": 51}, r"state\['num_samples'\] is 51; expected 50"),
            ({"sampling_rate": 0.2}, r"state\['sampling_rate'\] is 0.2; expected 0.1"),
            ({"version": 0}, r"state\['version'\] is 0; expected 1"),
            ({"next_step": -1}, r"state\['next_step'\] is -1; expected an int >= 0"),
        ],
    )
    def test_refuses_the_state_of_another_run(self, change, message):
        with pytest.raises(ValueError, match=message):
            sampler().load_state_dict(sampler().state_dict() | change)


class TestEmptyBatches:
    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_go_through_a_data_loader(self, num_workers):
        dataset = TensorDataset(torch.randn(20, 3, 4), torch.arange(20))
        batches = sampler(20, 0.05, 30)
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=EmptyBatchCollate(dataset),
            num_workers=num_workers,
        )
        sizes = []
        for x, y in loader:
            assert (x.shape[1:], x.dtype, y.dtype) == ((3, 4), torch.float32, torch.int64)
            assert x.shape[0] == y.shape[0]
            sizes.append(len(x))
        assert len(sizes) == 30
        assert 0 in sizes
        assert max(sizes) > 1

    def test_keep_the_structure_of_a_batch(self):
        Pair = namedtuple("Pair", "a b")
        sample = {
            "image": torch.zeros(2, 2),
            "pair": Pair(torch.zeros(3), 1.5),
            "name": "cat",
            "nested": [torch.zeros(1), {"label": 3}],
        }
        batch = EmptyBatchCollate([sample])([])
        assert batch["image"].shape == (0, 2, 2)
        assert isinstance(batch["pair"], Pair)
        assert (batch["pair"].a.shape, batch["pair"].b.shape) == ((0, 3), (0,))
        assert batch["name"] == []
        assert batch["nested"][0].shape == (0, 1)
        assert batch["nested"][1]["label"].shape == (0,)

    def test_keep_what_another_collate_function_makes(self):
        def collate(samples):
            return UserDict(ids=torch.stack(samples), mask=np.ones((len(samples), 4)), version=1)

        empty = EmptyBatchCollate([torch.zeros(4)], collate)
        batch = empty([])
        assert isinstance(batch, UserDict)
        assert (batch["ids"].shape, batch["mask"].shape, batch["version"]) == ((0, 4), (0, 4), 1)
        assert empty([torch.zeros(4)])["ids"].shape == (1, 4)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 0.1, 1), "num_samples is 0; expected an int >= 1"),
            ((10, 0.0, 1), "sampling_rate is 0.0; expected 0 < sampling_rate <= 1"),
            ((10, 1.1, 1), "sampling_rate is 1.1"),
            ((10, float("nan"), 1), "sampling_rate is nan"),
            ((10, 0.1, 0), "steps is 0; expected an int >= 1"),
            ((10, 0.1, 2.0), "steps is 2.0; expected an int >= 1"),
        ],
    )
    def test_name_the_argument_what_was_found_and_what_is_valid(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            PoissonBatchSampler(*arguments)
