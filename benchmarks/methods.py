"""The ways to get a step's gradients: without privacy, ours, Opacus, and vmap.

Each method prepares a step (not timed) and runs it (timed: forward, backward and, where private,
clipping and noise), leaving the gradient of the mean loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import Workload, cross_entropy
from torch import Tensor, nn

SEED = 0


@dataclass(frozen=True)
class Settings:
    """How to run: the device, bf16 autocast or not, and what compiles the graphs."""

    device: str
    autocast: bool = True
    lowering: str = "inductor"

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.autocast)

    def build(self, make: Callable[[], Any]) -> Any:
        """Call a builder on the device, with the same random numbers every time."""
        torch.manual_seed(SEED)
        with torch.device(self.device):
            return make()


class SkippedError(Exception):
    """The method cannot run here, and the reason is no failure of it."""


class Method:
    """A model and a batch, and a step that leaves ``.grad``."""

    private = False

    def __init__(self, workload: Workload, settings: Settings) -> None:
        self.workload = workload
        self.settings = settings
        self.inputs, self.targets = settings.build(workload.inputs)
        self.model: nn.Module = settings.build(self.build_model())
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

    def prepare(self) -> None:
        """Do what is not timed."""
        self.model.zero_grad(set_to_none=True)

    def run(self) -> None:
        """Run the step, leaving gradients."""
        self.step(self.model, self.inputs, self.targets)

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


class Eager(Method):
    """PyTorch without compilation or privacy."""


class Compiled(Method):
    """``torch.compile`` without privacy: the baseline."""

    def set_up(self) -> None:
        self.compiled = torch.compile(self.step, backend=_backend(self.settings))

    def run(self) -> None:
        self.compiled(self.model, self.inputs, self.targets)


class CompiledForAnySize(Compiled):
    """The baseline for batches of any size, as private steps are compiled."""

    def set_up(self) -> None:
        super().set_up()
        for tensor in (self.inputs, self.targets):
            torch._dynamo.mark_dynamic(tensor, 0)


class FlashNorm(Method):
    """The rewritten graph."""

    private = True

    def __init__(
        self,
        workload: Workload,
        settings: Settings,
        strategy: str,
        dynamic: bool | None = None,
    ) -> None:
        self.strategy = strategy
        self.dynamic = dynamic
        super().__init__(workload, settings)

    def set_up(self) -> None:
        import flashnorm_compile as fn

        self.private_step = fn.dp_step(
            self.step,
            dynamic=self.dynamic,
            max_grad_norm=1.0,
            noise_multiplier=0.0,
            expected_batch_size=self.workload.batch_size,
            strategy=self.strategy,
            lowering=self.settings.lowering,
        )

    def set_privacy(self, max_grad_norm: float, noise_multiplier: float) -> None:
        self.private_step.max_grad_norm = max_grad_norm
        self.private_step.noise_multiplier = noise_multiplier

    def run(self) -> None:
        self.private_step(self.model, self.inputs, self.targets)

    def norms(self) -> Tensor:
        return self.private_step.per_sample_norms


class Vmap(Method):
    """Per-sample gradients by ``vmap(grad(loss))``, all of it compiled."""

    private = True

    def set_up(self) -> None:
        self.parameters = {
            name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad
        }
        self.constants = {
            name: value.detach()
            for name, value in (*self.model.named_parameters(), *self.model.named_buffers())
            if name not in self.parameters
        }
        self.compiled = torch.compile(self.private_gradients, backend=_backend(self.settings))
        self.result: tuple[dict[str, Tensor], Tensor] | None = None
        self.set_privacy(1.0, 0.0)

    def set_privacy(self, max_grad_norm: float, noise_multiplier: float) -> None:
        device = self.settings.device
        self.max_grad_norm = torch.tensor(max_grad_norm, device=device)
        self.noise_multiplier = torch.tensor(noise_multiplier, device=device)

    def private_gradients(
        self,
        parameters: dict[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        max_grad_norm: Tensor,
        noise_multiplier: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            state = {**self.constants, **parameters}
            logits = torch.func.functional_call(self.model, state, (x.unsqueeze(0),))
            return cross_entropy(logits, y.unsqueeze(0))

        with self.settings.precision():
            per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
                parameters, inputs, targets
            )
        squares = [g.float().flatten(1).square().sum(1) for g in per_sample.values()]
        norms = torch.stack(squares).sum(0).sqrt()
        factors = (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        std = noise_multiplier * max_grad_norm
        gradients = {
            name: (torch.einsum("b,b...->...", factors, g.float()) + std * torch.randn_like(g[0]))
            / self.workload.batch_size
            for name, g in per_sample.items()
        }
        return gradients, norms

    def prepare(self) -> None:
        self.result = None

    def run(self) -> None:
        self.result = self.compiled(
            self.parameters, self.inputs, self.targets, self.max_grad_norm, self.noise_multiplier
        )

    def gradients(self) -> dict[str, Tensor]:
        assert self.result is not None
        return dict(self.result[0])

    def norms(self) -> Tensor:
        assert self.result is not None
        return self.result[1]


def _backend(settings: Settings) -> str:
    return {"inductor": "inductor", "eager": "aot_eager"}[settings.lowering]


def _opacus(ghost: bool) -> Callable[[Workload, Settings], Method]:
    def build(workload: Workload, settings: Settings) -> Method:
        try:
            from opacus_methods import OpacusGhost, OpacusHooks
        except ImportError as error:
            raise SkippedError(f"opacus is not installed ({error})") from error
        return (OpacusGhost if ghost else OpacusHooks)(workload, settings)

    return build


METHODS: dict[str, Callable[[Workload, Settings], Method]] = {
    "eager": Eager,
    "compiled": Compiled,
    "compiled-any-size": CompiledForAnySize,
    "flashnorm-auto": lambda w, s: FlashNorm(w, s, "auto"),
    "flashnorm-fixed-size": lambda w, s: FlashNorm(w, s, "auto", dynamic=False),
    "flashnorm-materialize": lambda w, s: FlashNorm(w, s, "materialize"),
    "flashnorm-ghost": lambda w, s: FlashNorm(w, s, "ghost"),
    "opacus-hooks": _opacus(ghost=False),
    "opacus-ghost": _opacus(ghost=True),
    "vmap": Vmap,
}
#: Minutes to compile at full size.
SLOW = ("vmap",)
