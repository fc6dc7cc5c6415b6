"""The changing side of a private step: settings, noise numbers, sums and what it reports."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.noise_streams import NoiseStream
from flashnorm_compile.options import Options
from flashnorm_compile.passes.release import REFUSED
from flashnorm_compile.released import came_from_us, mark_private, was_released
from flashnorm_compile.weak import WeakTensorDict


@dataclass(frozen=True)
class Settings:
    """What a forward ran with; its backward uses the same values and has to record them.

    Attributes:
        max_grad_norm: C.
        noise_multiplier: σ.
        block: number of the ``accumulate()`` block around it, None outside.
    """

    max_grad_norm: float
    noise_multiplier: float
    block: int | None

    @property
    def accumulating(self) -> bool:
        """Whether the noise comes later, over a sum of microbatches."""
        return self.block is not None


@dataclass
class Observation:
    """What the last private backward reports."""

    norms: torch.Tensor
    max_grad_norm: float

    @property
    def clipping_factors(self) -> torch.Tensor:
        """c_i [B]: min(1, C/(n_i + 1e-6)), 0 where n_i is not finite."""
        factors = (self.max_grad_norm / (self.norms + 1e-6)).clamp(max=1.0)
        return torch.where(torch.isfinite(self.norms), factors, torch.zeros_like(factors))


# parameter → the step that trains it.
_owners: WeakTensorDict[weakref.ref[StepState]] = WeakTensorDict()


@dataclass(eq=False)
class StepState:
    """The changing side of a private step, shared by all graphs compiled for it.

    Attributes:
        options: what the user asked for.
        max_grad_norm: C; may change between steps.
        noise_multiplier: σ; may change between steps.
        divisor: E, by which the noisy sum is divided.
        noise: numbers the releases.
        accumulating: whether microbatches are being added up (no noise yet).
        blocks: how many times that began.
        before_release: called with σ before noise is drawn.
        observations: norms of the last step, one entry per microbatch.
        parameters: the trainable parameters seen so far, and their names.
        sums: clipped sums of the microbatches so far, without noise.
        graphs_run: how many training graphs ran forward.
    """

    options: Options
    max_grad_norm: float = 0.0
    noise_multiplier: float = 0.0
    divisor: float = 1.0
    accumulating: bool = False
    blocks: int = 0
    before_release: Callable[[float], None] | None = None
    observations: list[Observation] = field(default_factory=list)
    parameters: WeakTensorDict[str] = field(default_factory=WeakTensorDict)
    sums: WeakTensorDict[torch.Tensor] = field(default_factory=WeakTensorDict)
    graphs_run: int = 0
    reports: list[Any] = field(default_factory=list)
    _refusals: list[_Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.max_grad_norm = self.options.max_grad_norm
        self.noise_multiplier = self.options.noise_multiplier
        self.divisor = self.options.divisor
        self.noise = NoiseStream(self.options.seed)

    @staticmethod
    def owner(parameter: torch.Tensor) -> StepState | None:
        """Return the state of the step that last trained a parameter."""
        reference = _owners.get(parameter)
        return None if reference is None else reference()

    def adopt(self, parameters: Sequence[tuple[torch.Tensor, str]]) -> None:
        """Remember the trainable parameters of a graph."""
        for parameter, name in parameters:
            if parameter.is_leaf and parameter not in self.parameters:
                self.parameters[parameter] = name
                _owners[parameter] = weakref.ref(self)

    @property
    def settings(self) -> Settings:
        """What a forward would run with now."""
        block = self.blocks if self.accumulating else None
        return Settings(self.max_grad_norm, self.noise_multiplier, block)

    def next_key(self, device: torch.device) -> torch.Tensor:
        """Return the key of the next release, int64 (seed, release number), and use it up."""
        return _on_device(self.noise.next(), torch.int64, device)

    def scalars(self, settings: Settings, device: torch.device) -> torch.Tensor:
        """Return float32 (C, σC, 1/E); without noise and division while accumulating."""
        clip = settings.max_grad_norm
        noise, scale = settings.noise_multiplier * clip, 1.0 / self.divisor
        if settings.accumulating:
            noise, scale = 0.0, 1.0
        return _on_device([clip, noise, scale], torch.float32, device)

    def observe(self, norms: torch.Tensor, settings: Settings) -> None:
        """Take the norms of a backward; refuse one whose loss was changed from outside."""
        norms = norms.detach()
        if not settings.accumulating:
            self.observations.clear()
        self.observations.append(Observation(norms, settings.max_grad_norm))
        self._refuse_if((norms == REFUSED).any(), _SEED_CHANGED)

    def refuse_zeros(self, gradients: Iterable[torch.Tensor]) -> None:
        """Refuse losses whose gradient is 0: what chose that may have looked at the samples."""
        for gradient in gradients:
            if gradient.numel() == 1:
                self._refuse_if((gradient == 0).any(), _LOSS_LEFT_OUT)

    def accept_zeroed(self) -> None:
        """Accept released gradients that were zeroed since; refuse those changed otherwise.

        They are zeroed once more, so that nothing depends on the answer, which on a GPU may come
        a step later.
        """
        for parameter, name in self.parameters.items():
            if parameter.grad is None:
                continue
            if was_released(parameter) and not came_from_us(parameter):
                changed = (parameter.grad != 0).any()
                parameter.grad.zero_()
                mark_private(parameter, releases=0)
                self._refuse_if(
                    changed,
                    f"{name}.grad was changed since it was released, and not to zero; it is "
                    "zeroed now. Call optimizer.zero_grad() before the step, with "
                    "set_to_none=True or False, and leave .grad alone otherwise "
                    "(clip_grad_norm_, scaling, averaging).",
                )

    def check_seed(self, *, wait: bool = True) -> None:
        """Raise what the last backwards were found to be refused for (see ``REFUSED``).

        Args:
            wait: wait for the device; otherwise leave an answer that is not there yet for later.
        """
        known = [refusal for refusal in self._refusals if wait or refusal.ready()]
        self._refusals = [refusal for refusal in self._refusals if refusal not in known]
        for refusal in known:
            if refusal.value():
                raise PrivacyError(refusal.message)

    def _refuse_if(self, flag: torch.Tensor, message: str) -> None:
        self._refusals.append(_Refusal(flag, message))
        if flag.device.type == "cpu":
            self.check_seed()


def _on_device(
    numbers: Sequence[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return a tensor of a few numbers without waiting for what the device has to do before."""
    pinned = device.type == "cuda"
    values = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=pinned)
    return values.to(device, non_blocking=True)


_LOSS_LEFT_OUT = (
    "backward() gives a loss of the compiled step the gradient 0: something outside (clamp, max, "
    "where, a product with 0) left it out, which may depend on the samples. Put it inside the "
    "compiled function, or leave the loss out of what backward() starts from."
)

_SEED_CHANGED = (
    "backward() did not start from the loss that the compiled step returned: the gradient that "
    "came in is not 1. A factor applied outside could depend on the samples; the gradients of "
    "this step are noise alone. Put the whole loss, with its weights, inside the compiled "
    "function; for gradient accumulation use accumulate() in place of dividing the loss."
)


class _Refusal:
    """A message, and a boolean on its way from a device, which nobody has to wait for."""

    def __init__(self, flag: torch.Tensor, message: str) -> None:
        self.message = message
        self.event: torch.cuda.Event | None = None
        self.host = flag
        if flag.device.type == "cuda":
            self.host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self.host.copy_(flag, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def ready(self) -> bool:
        return self.event is None or self.event.query()

    def value(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return bool(self.host)
