"""Poisson sampling of batches, which the accounting assumes, and collation of empty ones."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler, default_collate

STATE_VERSION = 1


class PoissonBatchSampler(Sampler[list[int]]):
    """Draws batches into which every sample goes independently with probability q.

    Batches differ in size and can be empty: see `EmptyBatchCollate`. A batch is a function of a
    secret seed and the number of the step, so a run can be resumed at any step. A new pass
    (epoch) continues the count, so no batch is drawn twice.

    Example:
        >>> sampler = PoissonBatchSampler(len(dataset), sampling_rate=0.01, steps=1000)
        >>> collate = EmptyBatchCollate(dataset)
        >>> loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)

    Args:
        num_samples: size of the data set.
        sampling_rate: q in (0, 1].
        steps: batches in one pass.
        generator: source of the seed. None takes it from the operating system, as the privacy of
            a real run requires: who can guess the batches gets no amplification by sampling.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        sampling_rate: float,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("steps", steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected an int >= 1")
        if not 0 < sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {sampling_rate}; expected 0 < sampling_rate <= 1")
        self.num_samples = num_samples
        self.sampling_rate = sampling_rate
        self.steps = steps
        self._next_step = 0
        if generator is None:
            self._seed = secrets.randbits(128)
        else:
            low, high = torch.randint(2**63 - 1, (2,), generator=generator).tolist()
            self._seed = high << 64 | low

    @property
    def expected_batch_size(self) -> float:
        """Mean number of samples in a batch, the E that a private mean divides by."""
        return self.num_samples * self.sampling_rate

    def __len__(self) -> int:
        """Return the number of batches left in this pass (all of them between two passes)."""
        return self.steps - self._next_step % self.steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices, in ascending order, of the batches left in this pass."""
        for _ in range(len(self)):
            step = self._next_step
            self._next_step += 1
            yield self._batch(step)

    def state_dict(self, steps_done: int | None = None) -> dict[str, Any]:
        """Return what is needed to continue, as plain data. It contains the secret seed.

        Args:
            steps_done: number of batches trained on since the first pass began. None takes the
                number of batches drawn, which is more if a DataLoader's workers prefetch.
        """
        return {
            "version": STATE_VERSION,
            "num_samples": self.num_samples,
            "sampling_rate": self.sampling_rate,
            "steps": self.steps,
            "seed": self._seed,
            "next_step": self._next_step if steps_done is None else steps_done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: the state belongs to other arguments or to another version.
        """
        expected = {"version": STATE_VERSION} | {
            name: getattr(self, name) for name in ("num_samples", "sampling_rate", "steps")
        }
        for name, value in expected.items():
            if state.get(name) != value:
                raise ValueError(f"state[{name!r}] is {state.get(name)!r}; expected {value!r}")
        for name in ("seed", "next_step"):
            if not isinstance(state.get(name), int) or state[name] < 0:
                raise ValueError(f"state[{name!r}] is {state.get(name)!r}; expected an int >= 0")
        self._seed = state["seed"]
        self._next_step = state["next_step"]

    def _batch(self, step: int) -> list[int]:
        """Return the indices of one batch: Philox, keyed by the seed, with the step as counter."""
        bits = np.random.Philox(key=self._seed, counter=step << 128)
        uniform = np.random.Generator(bits).random(self.num_samples)
        indices: list[int] = np.flatnonzero(uniform < self.sampling_rate).tolist()
        return indices


class EmptyBatchCollate:
    """Collates as another function does, and an empty batch to tensors of shape [0, ...].

    The shapes and dtypes of an empty batch are those of a batch of the data set's first sample.

    Args:
        dataset: the data set, indexed from 0.
        collate_fn: collates a non-empty list of samples to tensors with the batch in dim 0.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn

    def __call__(self, samples: list[Any]) -> Any:
        """Collate a list of samples, possibly empty."""
        if len(samples) > 0:
            return self.collate_fn(samples)
        return _without_samples(self.collate_fn([self.dataset[0]]))


def _without_samples(batch: Any) -> Any:
    """Cut a batch of one sample to none: tensors and arrays along dim 0, lists of strings to []."""
    if isinstance(batch, torch.Tensor | np.ndarray):
        return batch[:0] if batch.ndim > 0 else batch
    if isinstance(batch, Mapping):
        items = {name: _without_samples(value) for name, value in batch.items()}
        return type(batch)(items)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_without_samples(value) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(
            _without_samples(value) for value in batch if not isinstance(value, str | bytes)
        )
    return batch
