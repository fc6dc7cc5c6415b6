"""Opacus: per-sample gradients by hooks, and ghost clipping. Eager, as it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import opacus
from methods import Method
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

# Backward hooks on modules whose inputs need no gradient; Opacus expects them.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


class OpacusHooks(Method):
    """Per-sample gradients of every layer, then clipping and noise in the optimizer."""

    private = True

    def build_model(self) -> Callable[[], nn.Module]:
        return self.workload.build_for_opacus or self.workload.build

    @property
    def note(self) -> str:
        return f"Opacus {opacus.__version__}, eager. {self.workload.opacus_note}".strip()

    def set_up(self) -> None:
        self.model = GradSampleModule(self.model, loss_reduction="mean")
        self.optimizer = DPOptimizer(self.optimizer, **self.privacy())

    def privacy(self) -> dict[str, float | str]:
        return {
            "noise_multiplier": 0.0,
            "max_grad_norm": 1.0,
            "expected_batch_size": self.workload.batch_size,
            "loss_reduction": "mean",
        }

    def set_privacy(self, max_grad_norm: float, noise_multiplier: float) -> None:
        self.optimizer.max_grad_norm = max_grad_norm
        self.optimizer.noise_multiplier = noise_multiplier

    def leave_gradients(self) -> None:
        super().leave_gradients()
        # The two halves of DPOptimizer.step(): clipping, noise and scaling; then the update.
        self.optimizer.pre_step()

    def update(self) -> None:
        self.optimizer.original_optimizer.step()


class OpacusGhost(OpacusHooks):
    """Norms without gradients, then a second backward with weighted losses."""

    def set_up(self) -> None:
        self.model = GradSampleModuleFastGradientClipping(
            self.model, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
        )
        self.optimizer = DPOptimizerFastGradientClipping(self.optimizer, **self.privacy())
        self.criterion = DPLossFastGradientClipping(
            self.model, self.optimizer, nn.CrossEntropyLoss(), loss_reduction="mean"
        )

    def set_privacy(self, max_grad_norm: float, noise_multiplier: float) -> None:
        super().set_privacy(max_grad_norm, noise_multiplier)
        self.model.max_grad_norm = max_grad_norm

    def step(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        with self.settings.precision():
            logits = model(inputs)
            loss = self.criterion(logits.flatten(0, -2), targets.flatten(), shape=logits.shape)
        loss.backward()
        return loss.detach()

    def norms(self) -> Tensor:
        return self.model.per_sample_gradient_norms
