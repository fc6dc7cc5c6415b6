"""The three things a value of the graph can be, seen from the batch axis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy
from torch import fx

ONE = sympy.Integer(1)


@dataclass(frozen=True)
class Constant:
    """Independent of every sample: parameters, buffers, index ranges, fresh random numbers."""


@dataclass(frozen=True)
class Batched:
    """Slice ``b`` along the axis depends on sample ``b`` and on constants only.

    The axis may be merged with others in one dim: the dim has ``outer * B * inner`` entries,
    and entry ``(o * B + b) * inner + n`` belongs to sample ``b``.
    """

    dim: int
    outer: sympy.Expr = ONE
    inner: sympy.Expr = ONE

    def at(self, dim: int) -> Batched:
        """Return the same axis at another dim."""
        return replace(self, dim=dim)


@dataclass(frozen=True)
class Mixed:
    """Depends on several samples; ``origin`` is the node where they first met."""

    origin: fx.Node
    reason: str


# A tuple is the value of an op with several outputs.
Value: TypeAlias = Constant | Batched | Mixed | tuple["Value", ...]
