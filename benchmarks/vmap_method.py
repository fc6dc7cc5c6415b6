"""Per-sample gradients by ``vmap(grad(loss))``: DP-SGD in a few lines of torch.func."""

from __future__ import annotations

import torch
from methods import Method, Settings, SkippedError
from models import Workload, cross_entropy
from torch import Tensor


class Vmap(Method):
    """Every sample's gradient is kept until all are clipped; compiled as a whole, or eager."""

    private = True

    def __init__(self, workload: Workload, settings: Settings, compiled: bool) -> None:
        self.keeps_code = compiled
        super().__init__(workload, settings)

    def set_up(self) -> None:
        self.parameters = {
            name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad
        }
        self.constants = {
            name: value.detach()
            for name, value in (*self.model.named_parameters(), *self.model.named_buffers())
            if name not in self.parameters
        }
        self.private_step = self.private_gradients
        if self.keeps_code:
            backend = self.settings.backend
            self.private_step = torch.compile(self.private_gradients, backend=backend)
        self.last_norms: Tensor | None = None
        self.set_privacy(1.0, 0.0)

    def set_privacy(self, max_grad_norm: float, noise_multiplier: float) -> None:
        device = self.settings.device
        self.max_grad_norm = torch.tensor(max_grad_norm, device=device)
        self.noise_multiplier = torch.tensor(noise_multiplier, device=device)

    def for_any_size(self) -> None:
        if self.keeps_code:
            raise SkippedError("torch.compile makes code of a vmap for one batch size alone")

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
        squares = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in per_sample.values()]
        norms = torch.linalg.vector_norm(torch.stack(squares), dim=0)
        factors = (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        std = noise_multiplier * max_grad_norm
        gradients = {
            name: (torch.einsum("b,b...->...", factors, g) + std * torch.randn_like(g[0]))
            / self.workload.batch_size
            for name, g in per_sample.items()
        }
        return gradients, norms

    def leave_gradients(self) -> None:
        gradients, self.last_norms = self.private_step(
            self.parameters, self.inputs, self.targets, self.max_grad_norm, self.noise_multiplier
        )
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = gradients[name]

    def norms(self) -> Tensor | None:
        return self.last_norms
