"""A batch without samples, as Poisson sampling draws now and then: its gradient is noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashnorm_compile.kernels.noise import add_noise
from flashnorm_compile.passes.layout import laid_out, memory_order


class EmptyBatchGraph:
    """Stands in for a compiled training graph when the batch holds no samples.

    The forward runs as it is, for the values that the user's code expects (often NaN). No
    backward is traced: decompositions divide by the number of samples, and there is nothing to
    differentiate.
    """

    def __init__(self, forward: Callable[..., Any], parameters: Sequence[int]) -> None:
        self.forward = forward
        self.parameters = tuple(parameters)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Take Dynamo's inputs, the probe, the key and the scalars, as a rewritten graph does."""
        *inputs, probe, key, scalars = args
        outputs = list(self.forward(*inputs))
        differentiable = [
            i for i, x in enumerate(outputs) if isinstance(x, torch.Tensor) and x.requires_grad
        ]
        reached = _leaves_behind([outputs[i] for i in differentiable])
        parameters = [inputs[i] for i in self.parameters if id(inputs[i]) in reached]
        values = [outputs[i].detach() for i in differentiable]
        *values, marker = _NoiseAlone.apply(key, scalars, len(values), *values, probe, *parameters)
        for i, value in zip(differentiable, values, strict=True):
            outputs[i] = value
        return (*outputs, marker)


class _NoiseAlone(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: torch.Tensor, scalars: torch.Tensor, count: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        *values, probe = tensors[: count + 1]
        ctx.count = count
        ctx.save_for_backward(key, scalars, *tensors[count:])
        return (*(value.clone() for value in values), probe.sum())

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> tuple[Any, ...]:
        key, scalars, probe, *parameters = ctx.saved_tensors
        noise = [
            _noise_for(parameter, key, scalars, stream)
            for stream, parameter in enumerate(parameters)
        ]
        return (None, None, None, *[None] * ctx.count, torch.zeros_like(probe), *noise)


def _noise_for(
    parameter: torch.Tensor, key: torch.Tensor, scalars: torch.Tensor, stream: int
) -> torch.Tensor:
    zeros = torch.zeros_like(parameter, dtype=torch.float32)
    noise = add_noise(zeros, key, scalars, stream, parameter.dtype)
    order = memory_order(parameter)
    return noise if order is None else laid_out(noise, order)


def _leaves_behind(outputs: list[torch.Tensor]) -> set[int]:
    """Find the ids of the leaves that get a gradient from the outputs."""
    found: set[int] = set()
    pending = [output.grad_fn for output in outputs]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        pending.extend(following for following, _ in node.next_functions)
    return found
