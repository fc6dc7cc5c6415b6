"""The ways to take a training step: without privacy, ours, Opacus, and vmap.

The step has the same shape for all: ``zero_grad``, then forward, loss and backward (for compiled
methods one function under ``torch.compile``; for private ones with clipping and noise), then the
update by AdamW with ``fused=True``, called as it is: one pass over the weights by PyTorch's own
kernel, which a compiled optimizer does not beat.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from models import Workload, cross_entropy
from torch import Tensor, nn

SEED = 0
LEARNING_RATE = 1e-5
REDUCE_OVERHEAD = "reduce-overhead"


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        device: "cuda" or "cpu".
        autocast: bf16 autocast over float32 weights, or float32.
        lowering: "inductor", or "eager": captured graphs run as they are.
        optimizer: whether the update belongs to the step.
    """

    device: str
    autocast: bool = True
    lowering: str = "inductor"
    optimizer: bool = True

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.autocast)

    def build(self, make: Callable[[], Any], seed: int = SEED) -> Any:
        """Call a builder on the device, with the same random numbers every time."""
        torch.manual_seed(seed)
        with torch.device(self.device):
            return make()

    @property
    def backend(self) -> str:
        return {"inductor": "inductor", "eager": "aot_eager"}[self.lowering]

    def mode(self, mode: str | None) -> str | None:
        """Return a mode of Inductor where Inductor is used."""
        return mode if self.lowering == "inductor" else None


class SkippedError(Exception):
    """The method cannot run here, and the reason is no failure of it."""


class Method:
    """A model, a batch and an optimizer, and the step that uses them.

    Attributes:
        private: whether gradients are clipped and noised.
        keeps_code: whether code compiled for one batch is worth keeping for another; a method
            that compiles nothing is made anew instead, with nothing left over.
        graphs: whether its kernels are replayed as CUDA graphs.
    """

    private = False
    keeps_code = False
    graphs = False

    def __init__(self, workload: Workload, settings: Settings) -> None:
        self.workload = workload
        self.settings = settings
        self.resize(workload.batch_size)
        self.model: nn.Module = settings.build(self.build_model())
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, fused=True)
        self.set_up()

    def build_model(self) -> Callable[[], nn.Module]:
        """Return the builder of the model that this method runs."""
        return self.workload.build

    @property
    def note(self) -> str:
        """What a reader must know to compare the numbers."""
        return ""

    def set_up(self) -> None:
        """Compile or wrap the model."""

    def set_privacy(self, max_grad_norm: float, noise_multiplier: float) -> None:
        """Change C and σ for the next steps."""

    def resize(self, batch_size: int) -> None:
        """Draw a batch of another size."""
        self.inputs, self.targets = self.settings.build(lambda: self.workload.inputs(batch_size))

    def for_any_size(self) -> None:
        """Be ready for batches of many sizes with one compilation; call before the first step.

        Raises:
            SkippedError: each size would be compiled anew.
        """

    def run(self) -> None:
        """Take the step that is measured."""
        self.clear()
        self.leave_gradients()
        if self.settings.optimizer:
            self.update()

    def clear(self) -> None:
        """Drop the last step's gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def leave_gradients(self) -> None:
        """Run forward and backward; where private, clip and add noise."""
        self.step(self.model, self.inputs, self.targets)

    def update(self) -> None:
        """Change the weights."""
        self.optimizer.step()

    def step(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        with self.settings.precision():
            loss = cross_entropy(model(inputs), targets)
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Return the last step's gradients by the plain model's parameter names."""
        return {
            name.removeprefix("_module."): parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def norms(self) -> Tensor | None:
        """Return the last step's per-sample norms [B], if the method reports them."""
        return None

    def plan(self) -> str:
        """Return what was decided for each parameter, if anything was."""
        return ""


class Eager(Method):
    """PyTorch without compilation or privacy."""


class Compiled(Method):
    """``torch.compile`` without privacy: the baseline."""

    keeps_code = True

    def __init__(
        self,
        workload: Workload,
        settings: Settings,
        mode: str | None = None,
        any_size: bool = False,
    ) -> None:
        self.mode = mode
        self.any_size = any_size
        self.graphs = mode == REDUCE_OVERHEAD and settings.device == "cuda"
        super().__init__(workload, settings)

    def set_up(self) -> None:
        settings = self.settings
        self.compiled = torch.compile(
            self.step, backend=settings.backend, mode=settings.mode(self.mode)
        )

    def resize(self, batch_size: int) -> None:
        super().resize(batch_size)
        self._mark()

    def for_any_size(self) -> None:
        self.any_size = True
        self._mark()

    def _mark(self) -> None:
        if self.any_size and len(self.inputs) > 1:
            for tensor in (self.inputs, self.targets):
                torch._dynamo.mark_dynamic(tensor, 0)

    def leave_gradients(self) -> None:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self.compiled(self.model, self.inputs, self.targets)


class FlashNorm(Method):
    """The rewritten graph."""

    private = True
    keeps_code = True

    def __init__(
        self,
        workload: Workload,
        settings: Settings,
        strategy: str,
        dynamic: bool | None = None,
        mode: str | None = None,
        **options: Any,
    ) -> None:
        self.options = {"strategy": strategy, **options}
        self.dynamic = dynamic
        self.mode = mode
        self.graphs = mode == REDUCE_OVERHEAD and settings.device == "cuda"
        super().__init__(workload, settings)

    def set_up(self) -> None:
        import flashnorm_compile as fn

        settings = self.settings
        self.private_step = fn.dp_step(
            self.step,
            dynamic=self.dynamic,
            mode=settings.mode(self.mode),
            max_grad_norm=1.0,
            noise_multiplier=0.0,
            expected_batch_size=self.workload.batch_size,
            lowering=settings.lowering,
            **self.options,
        )

    def set_privacy(self, max_grad_norm: float, noise_multiplier: float) -> None:
        self.private_step.max_grad_norm = max_grad_norm
        self.private_step.noise_multiplier = noise_multiplier

    def for_any_size(self) -> None:
        if self.dynamic is False:
            raise SkippedError("code is made for one batch size alone")

    def leave_gradients(self) -> None:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self.private_step(self.model, self.inputs, self.targets)

    def norms(self) -> Tensor:
        return self.private_step.per_sample_norms

    def plan(self) -> str:
        return str(self.private_step.plan)


Builder = Callable[[Workload, Settings], Method]


def _opacus(name: str) -> Builder:
    def build(workload: Workload, settings: Settings) -> Method:
        try:
            import opacus_methods
        except ImportError as error:
            raise SkippedError(f"opacus is not installed ({error})") from error
        return getattr(opacus_methods, name)(workload, settings)

    return build


def _vmap(workload: Workload, settings: Settings, compiled: bool) -> Method:
    from vmap_method import Vmap

    return Vmap(workload, settings, compiled)


#: Beside flashnorm's strategies, of which each is a method too. What is compared comes first.
METHODS: Mapping[str, Builder] = {
    "compiled": Compiled,
    "compiled-reduce-overhead": lambda w, s: Compiled(w, s, mode=REDUCE_OVERHEAD),
    "compiled-any-size": lambda w, s: Compiled(w, s, any_size=True),
    "flashnorm-reduce-overhead": lambda w, s: FlashNorm(w, s, "auto", mode=REDUCE_OVERHEAD),
    "flashnorm-fixed-size": lambda w, s: FlashNorm(w, s, "auto", dynamic=False),
    "eager": Eager,
    "opacus-ghost": _opacus("OpacusGhost"),
    "opacus-hooks": _opacus("OpacusHooks"),
    "vmap-eager": functools.partial(_vmap, compiled=False),
    "vmap": functools.partial(_vmap, compiled=True),
}
#: Minutes to compile at full size.
SLOW = ("vmap",)


def find_method(name: str) -> Builder:
    """Return the builder of a method.

    Raises:
        ValueError: the name is not known.
    """
    if name in METHODS:
        return METHODS[name]
    # The library is asked for its strategies only where it is used.
    ours = flashnorm_methods() if name.startswith("flashnorm-") else {}
    if name not in ours:
        raise ValueError(f"no method {name!r}; known: {', '.join(method_names())}")
    return lambda workload, settings: FlashNorm(workload, settings, **ours[name])


def flashnorm_methods() -> dict[str, dict[str, str]]:
    """Return a method for each strategy of flashnorm's, and for those with given kernels.

    "flash" norms are by its own kernels always.
    """
    from flashnorm_compile.options import Kernels, Strategy

    found = {}
    for strategy, kernels in itertools.product(get_args(Strategy), get_args(Kernels)):
        if kernels == "auto":
            found[f"flashnorm-{strategy}"] = {"strategy": strategy}
        elif strategy != "flash":
            name = f"flashnorm-{strategy}-{kernels}"
            found[name] = {"strategy": strategy, "kernels": kernels}
    return found


def method_names() -> tuple[str, ...]:
    """Return all methods: the baseline, flashnorm's, then the others."""
    return tuple(sorted([*METHODS, *flashnorm_methods()], key=rank))


def rank(name: str) -> int:
    """Order methods: the baseline first, then ours, then what else there is."""
    prefixes = ("compiled", "flashnorm-auto", "flashnorm", "eager", "opacus", "vmap")
    return next((i for i, p in enumerate(prefixes) if name.startswith(p)), len(prefixes))
