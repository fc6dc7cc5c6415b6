"""Which noise was drawn: no two releases of a process get the same.

Two releases with the same noise differ by their un-noised difference. The noise is a function of
(seed, release number), so a process keeps account of the pairs that it has used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from typing import Any

from flashnorm_compile.errors import PrivacyError


class _Account:
    """What was drawn so far; by the account's own steps and by those of accounts inside it."""

    def __init__(self, outer: _Account | None = None) -> None:
        self.outer = outer
        # Given seed → how many steps were made with it.
        self.made: Counter[int] = Counter()
        # Seed of a stream → the number after its last release.
        self.drawn: dict[int, int] = {}

    def open(self, seed: int) -> int:
        """Return the stream's seed for one more step that was given ``seed``."""
        ordinal = self.made[seed]
        while (opened := _mixed(seed, ordinal)) in self.drawn:
            ordinal += 1
        self._note_made(seed, ordinal + 1)
        return opened

    def draw(self, seed: int, release: int) -> None:
        self.drawn[seed] = max(self.drawn.get(seed, 0), release + 1)
        if self.outer is not None:
            self.outer.draw(seed, release)

    def _note_made(self, seed: int, count: int) -> None:
        self.made[seed] = max(self.made[seed], count)
        if self.outer is not None:
            self.outer._note_made(seed, count)


_account = _Account()


@contextlib.contextmanager
def repeat_noise() -> Iterator[None]:
    """Draw noise as a new process would: what was drawn before the block may come again.

    For reproducing a run inside one process. Safe only if the run inside releases the same
    values from the same batches as the one before; two different gradients under the same noise
    differ by their un-noised difference.

    Example:
        >>> with repeat_noise():
        ...     again = train(seed=0)
    """
    global _account
    before = _account
    _account = _Account(before)
    try:
        yield
    finally:
        _account = before


class NoiseStream:
    """Numbers the releases of a step.

    Args:
        seed: what the user gave; None draws 63 bits from the operating system. The first step of
            a process with a seed takes it as it is, later ones mix their number into it.

    Attributes:
        seed: of the noise.
        releases: how many releases drew noise; the next one draws under this number.
    """

    def __init__(self, seed: int | None) -> None:
        self._account = _account
        self._process = os.getpid()
        # Noise that an observer can guess protects nobody.
        self.seed = secrets.randbits(63) if seed is None else _account.open(seed)
        self.releases = 0

    def __deepcopy__(self, _memo: Any) -> NoiseStream:
        """Share the numbering: a copy of its own would repeat the noise."""
        return self

    def next(self) -> tuple[int, int]:
        """Return (seed, release number) of the next release, and use it up.

        Raises:
            PrivacyError: this noise was drawn before.
        """
        if os.getpid() != self._process:
            raise PrivacyError(
                "The step was made before this process was forked: the other process draws the "
                "same noise. Make the step in the process that runs it."
            )
        self._refuse_drawn(self.seed, self.releases)
        release = self.releases
        self._account.draw(self.seed, release)
        self.releases += 1
        return self.seed, release

    def resume(self, seed: int, releases: int) -> None:
        """Continue a saved stream.

        Raises:
            PrivacyError: this process has drawn later releases of it.
        """
        self._refuse_drawn(seed, releases, account=_account)
        self._account = _account
        self.seed, self.releases = seed, releases

    def _refuse_drawn(self, seed: int, release: int, account: _Account | None = None) -> None:
        drawn = (account or self._account).drawn.get(seed, 0)
        if release < drawn:
            raise PrivacyError(
                f"The noise of release {release} was drawn before: this process has drawn "
                f"{drawn} releases of the stream (a step with an older state, or another step "
                "with the same state). Two releases with the same noise differ by their un-noised "
                "difference. To go back to older weights, load those of the model and the "
                "optimizer and leave the state of the step and the accountant as it is. To "
                "repeat a run with the same batches, use "
                "flashnorm_compile.noise_streams.repeat_noise()."
            )


def _mixed(seed: int, ordinal: int) -> int:
    if ordinal == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {ordinal}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
