"""What happens around a rewritten graph: noise keys, releases, and checks that fail closed."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from flashnorm_compile._torch import queue_backward_callback
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.options import Options
from flashnorm_compile.passes.release import REFUSED


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


@dataclass(frozen=True)
class _Released:
    """How a released gradient looked when it arrived in ``.grad``."""

    pointer: int
    version: int
    count: int


# parameter → its last private gradient; keyed by identity, and gone with the parameter.
_released: WeakIdKeyDictionary = WeakIdKeyDictionary()
# parameter → the step that trains it.
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(eq=False)
class StepState:
    """The changing side of a private step, shared by all graphs compiled for it.

    Attributes:
        options: what the user asked for.
        max_grad_norm: C; may change between steps.
        noise_multiplier: σ; may change between steps.
        divisor: E, by which the noisy sum is divided.
        seed: seeds the noise.
        releases: how many releases drew noise; the next one draws under this number.
        accumulating: whether microbatches are being added up (no noise yet).
        before_release: called before noise is drawn.
        observations: norms of the last step, one entry per microbatch.
        parameters: the trainable parameters seen so far, and their names.
        sums: clipped sums of the microbatches so far, without noise.
        graphs_run: how many training graphs ran forward.
    """

    options: Options
    max_grad_norm: float = 0.0
    noise_multiplier: float = 0.0
    divisor: float = 1.0
    seed: int = 0
    releases: int = 0
    accumulating: bool = False
    before_release: Callable[[], None] | None = None
    observations: list[Observation] = field(default_factory=list)
    parameters: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    sums: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    graphs_run: int = 0
    backwards_run: int = 0
    reports: list[Any] = field(default_factory=list)
    _refused: list[_Flag] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.max_grad_norm = self.options.max_grad_norm
        self.noise_multiplier = self.options.noise_multiplier
        self.divisor = self.options.divisor
        # 63 bits from the operating system: noise that an observer can guess protects nobody.
        self.seed = secrets.randbits(63) if self.options.seed is None else self.options.seed

    @staticmethod
    def owner(parameter: torch.Tensor) -> StepState | None:
        """Return the state of the step that last trained a parameter."""
        reference = _owners.get(parameter)
        return None if reference is None else reference()

    def adopt(self, parameters: Sequence[tuple[torch.Tensor, str]]) -> None:
        """Remember the trainable parameters of a graph."""
        for parameter, name in parameters:
            if parameter not in self.parameters:
                self.parameters[parameter] = name
                _owners[parameter] = weakref.ref(self)

    def next_key(self, device: torch.device) -> torch.Tensor:
        """Return the key of the next release, int64 (seed, release number), and use it up."""
        release = self.releases
        self.releases += 1
        return torch.tensor([self.seed, release], dtype=torch.int64, device=device)

    def scalars(self, device: torch.device) -> torch.Tensor:
        """Return float32 (C, σC, 1/E); without noise and division while accumulating."""
        clip = self.max_grad_norm
        noise, scale = self.noise_multiplier * clip, 1.0 / self.divisor
        if self.accumulating:
            noise, scale = 0.0, 1.0
        return torch.tensor([clip, noise, scale], dtype=torch.float32, device=device)

    def observe(self, norms: torch.Tensor, max_grad_norm: float) -> None:
        """Take the norms of a backward; refuse one whose loss was changed from outside."""
        norms = norms.detach()
        if not self.accumulating:
            self.observations.clear()
        self.observations.append(Observation(norms, max_grad_norm))
        self._refused.append(_Flag((norms == REFUSED).any()))
        if norms.device.type == "cpu":
            self.check_seed()

    def check_seed(self, *, wait: bool = True) -> None:
        """Raise if the last backward did not start from the loss itself (see ``REFUSED``).

        Args:
            wait: wait for the device; otherwise leave an answer that is not there yet for later.
        """
        known = [flag for flag in self._refused if wait or flag.ready()]
        self._refused = [flag for flag in self._refused if flag not in known]
        if any(flag.value() for flag in known):
            raise PrivacyError(
                "backward() did not start from the loss that the compiled step returned: the "
                "gradient that came in is not 1. A factor applied outside could depend on the "
                "samples; the gradients of this step are noise alone. Put the whole loss, with "
                "its weights, inside the compiled function; for gradient accumulation use "
                "accumulate() in place of dividing the loss."
            )


class _Flag:
    """A boolean on its way from a device, which nobody has to wait for."""

    def __init__(self, flag: torch.Tensor) -> None:
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


class PrivateGraph:
    """A compiled training graph, called with Dynamo's inputs.

    Appends the probe, the noise key and the scalars, and watches the backward.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        state: StepState,
        batch_index: int,
        batch_dim: int,
        parameters: Sequence[tuple[int, str]],
    ) -> None:
        self.compiled = compiled
        self.state = state
        self.batch_index = batch_index
        self.batch_dim = batch_dim
        self.parameters = tuple(parameters)

    def __call__(self, *args: Any) -> Any:
        """Run the forward; the backward runs when autograd asks for it."""
        state = self.state
        if not torch.is_grad_enabled():
            raise PrivacyError("A training graph runs with gradients disabled.")
        state.check_seed(wait=False)
        sample = args[self.batch_index]
        device = sample.device
        probe = torch.empty(sample.shape[self.batch_dim], device=device, requires_grad=True)
        clip = state.max_grad_norm
        outputs = self.compiled(*args, probe, state.next_key(device), state.scalars(device))
        state.graphs_run += 1
        *outputs, marker = outputs
        parameters = [(args[i], name) for i, name in self.parameters]
        state.adopt(parameters)
        watch = _Backward(state, clip, parameters)
        watch.attach(marker.grad_fn, probe)
        return tuple(outputs)


class _Backward:
    """Watches one backward of a rewritten graph."""

    def __init__(
        self, state: StepState, clip: float, parameters: list[tuple[torch.Tensor, str]]
    ) -> None:
        self.state = state
        self.clip = clip
        # Weak: the autograd graph holds the hooks, and must not keep parameters alive by them.
        self.parameters = [(weakref.ref(parameter), name) for parameter, name in parameters]
        self.runs = 0
        self.expected: dict[int, tuple[int, int] | None] = {}

    def attach(self, node: Any, probe: torch.Tensor) -> None:
        node.register_prehook(self.before)
        node.register_hook(self.after)
        clip, state = self.clip, self.state

        @torch.compiler.disable
        def observe(norms: torch.Tensor) -> None:
            state.observe(norms, clip)

        probe.register_hook(observe)

    @torch.compiler.disable
    def before(self, _grad_outputs: Any) -> None:
        """Run before anything is computed: refuse, or record the release."""
        self.runs += 1
        if self.runs > 1:
            raise PrivacyError(
                "A second backward() over one forward is a second release of the same samples, "
                "with the same noise. Run the forward again."
            )
        for parameter, name in self._alive():
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise PrivacyError(
                    f"{name} has a gradient hook, which could see or change gradients on their "
                    "way to .grad. Remove the hook, or read .grad after backward()."
                )
            if parameter.grad is None:
                continue
            if self.state.accumulating:
                raise PrivacyError(
                    f"{name}.grad is not empty inside accumulate(). Call optimizer.zero_grad() "
                    "before it."
                )
            if not came_from_us(parameter):
                raise PrivacyError(
                    f"{name}.grad already holds a gradient that is not private; adding to it "
                    "would hide that. Call optimizer.zero_grad() before the step."
                )
        if self.state.before_release is not None and not self.state.accumulating:
            self.state.before_release()
        self.state.backwards_run += 1

    @torch.compiler.disable
    def after(self, grad_inputs: Sequence[torch.Tensor | None], _grad_outputs: Any) -> None:
        """Note which gradients leave, and check at the end that they arrived alone."""
        leaving = {g.data_ptr(): g._version for g in grad_inputs if g is not None}
        self.leaving = leaving
        self.previous = {
            id(parameter): (parameter.grad.data_ptr(), parameter.grad._version)
            for parameter, _ in self._alive()
            if parameter.grad is not None
        }
        queue_backward_callback(self.verify)

    @torch.compiler.disable
    def verify(self) -> None:
        """Check that each ``.grad`` is what left the graph, and nothing was added to it."""
        for parameter, name in self._alive():
            grad = parameter.grad
            if grad is None:
                continue
            pointer, version = grad.data_ptr(), grad._version
            before = self.previous.get(id(parameter))
            if before is None:
                arrived = self.leaving.get(pointer) == version
            else:
                arrived = (pointer, version) == (before[0], before[1] + 1)
            if not arrived and grad.numel():
                self._discard()
                raise PrivacyError(
                    f"{name} gets a gradient from outside the compiled step (or the step is only "
                    "a part of the loss): what arrived in .grad is not what the private backward "
                    "released. All gradients were discarded. Put every use of the parameter, and "
                    "the whole loss, inside the compiled function."
                )
            count = 1 if before is None else 1 + releases_in(parameter)
            _released[parameter] = _Released(pointer, version, count)
        if self.state.accumulating:
            self._absorb()

    def _absorb(self) -> None:
        """Take a microbatch's sum out of ``.grad``: without noise it is nobody's to use."""
        for parameter, _ in self._alive():
            if parameter.grad is None:
                continue
            part, parameter.grad = parameter.grad.float(), None
            sums = self.state.sums
            sums[parameter] = part if parameter not in sums else sums[parameter].add_(part)

    def _alive(self) -> list[tuple[torch.Tensor, str]]:
        found = [(ref(), name) for ref, name in self.parameters]
        return [(parameter, name) for parameter, name in found if parameter is not None]

    def _discard(self) -> None:
        for parameter, _ in self._alive():
            parameter.grad = None


def came_from_us(parameter: torch.Tensor) -> bool:
    """Return whether a parameter's ``.grad`` is a released one, untouched since."""
    released = _released.get(parameter)
    grad = parameter.grad
    if released is None or grad is None:
        return False
    return (grad.data_ptr(), grad._version) == (released.pointer, released.version)


def releases_in(parameter: torch.Tensor) -> int:
    """Return how many releases were added up in a parameter's ``.grad``."""
    released = _released.get(parameter)
    return 0 if released is None else released.count


def mark_private(parameter: torch.Tensor) -> None:
    """Record a parameter's present ``.grad`` as a released one."""
    grad = parameter.grad
    if grad is not None:
        _released[parameter] = _Released(grad.data_ptr(), grad._version, 1)
