"""Where samples lie in a tensor, and where a parameter's dims lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.passes.batch_axis.values import Batched


@dataclass(frozen=True)
class SampleAxis:
    """Where the samples are: dim ``dim`` has size outer·B·inner, as plain data for snippets.

    ``outer`` and ``inner`` are None where the size is symbolic; then it follows from the other.
    """

    dim: int
    outer: int | None
    inner: int | None

    @classmethod
    def of(cls, value: Batched) -> SampleAxis:
        """Convert an analysis value."""
        outer, inner = _integer(value.outer), _integer(value.inner)
        if outer is None and inner is None:
            raise PrivacyError(
                "The batch axis lies between two axes of varying size; fix one of them (compile "
                "with a constant sequence length)."
            )
        return cls(value.dim, outer, inner)

    @property
    def plain(self) -> bool:
        """Whether the dim holds the samples and nothing else."""
        return self.outer == 1 and self.inner == 1

    def split(self, x: torch.Tensor, batch_size: int) -> torch.Tensor:
        """View [..., outer·B·inner, ...] as [..., outer, B, inner, ...]."""
        outer, inner = self._sizes(x.shape[self.dim], batch_size)
        return x.reshape(*x.shape[: self.dim], outer, batch_size, inner, *x.shape[self.dim + 1 :])

    def to_front(self, x: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Return [B, ..., outer, inner, ...], the rest in order."""
        return self.split(x, batch_size).movedim(self.dim + 1, 0)

    def slices(self, x: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Return [B, ..., outer·inner, ...]: each sample with its axis where it was."""
        return self.to_front(x, batch_size).flatten(self.dim + 1, self.dim + 2)

    def spread(self, factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Shape a [B] tensor so that it broadcasts against ``x``, sample by sample."""
        if not self.plain:
            size = x.shape[self.dim]
            outer, inner = self._sizes(size, factor.shape[0])
            factor = factor.view(1, -1, 1).expand(outer, factor.shape[0], inner).reshape(size)
        return factor.view(-1, *(1,) * (x.ndim - self.dim - 1))

    def _sizes(self, size: int, batch_size: int) -> tuple[int, int]:
        inner = self.inner if self.inner is not None else size // batch_size // (self.outer or 1)
        outer = self.outer if self.outer is not None else size // batch_size // inner
        return outer, inner


def masked_scale(
    axis: SampleAxis, x: torch.Tensor, weights: torch.Tensor, *, scale: bool
) -> torch.Tensor:
    """Zero the samples of weight 0, and scale the others if ``scale``.

    A select, not a product: a sample without a finite norm holds NaN or infinity, and 0·NaN is
    NaN.
    """
    weight = axis.spread(weights, x)
    kept = (x * weight).to(x.dtype) if scale else x
    return torch.where(weight == 0, torch.zeros((), dtype=x.dtype, device=x.device), kept)


def memory_order(parameter: torch.Tensor) -> list[int] | None:
    """Return a dense parameter's dims as they lie in memory; None if they lie in order.

    Autograd copies a gradient that is not laid out as its parameter (a parameter with gaps wants
    a row-major one), and the copy in ``.grad`` is not what was released.
    """
    order = sorted(range(parameter.ndim), key=parameter.stride().__getitem__, reverse=True)
    dense = parameter.permute(order).is_contiguous()
    return order if dense and not parameter.is_contiguous() else None


def laid_out(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Lay a tensor's dims out in the given order in memory."""
    return x.permute(order).contiguous().permute(sorted(range(x.ndim), key=order.__getitem__))


def _integer(expr: sympy.Expr) -> int | None:
    return int(expr) if expr.is_Integer else None
