"""The derivative of the matrix exponential: linear, though it is written as an exponential.

Autograd takes it from a block of a larger one (Higham 2008, Functions of Matrices, eq. 10.15 and
theorem 3.6):

    exp([[A, G], [0, B]])[:n, n:] = ∫₀¹ exp((1-s)A) G exp(sB) ds

It is linear in G where A and B are constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flashnorm_compile.passes.batch_axis.analysis import Analysis
from flashnorm_compile.passes.batch_axis.values import Constant
from flashnorm_compile.passes.sites.generic import is_zero_fill

aten = torch.ops.aten

_REARRANGES = {aten.permute.default, aten.clone.default, aten.expand.default, aten.view.default}


@dataclass(frozen=True)
class Derivative:
    """A derivative in some direction.

    Attributes:
        direction: G, [..., n, n].
        nodes: from the blocks to the exponential of them all, [..., 2n, 2n].
    """

    direction: fx.Node
    nodes: frozenset[fx.Node]


def match_derivative(node: fx.Node, analysis: Analysis) -> Derivative | None:
    """Recognise an exponential of which only the block that is linear in G is used."""
    if node.target is not aten.linalg_matrix_exp.default:
        return None
    whole: Any = node.args[0]
    rows = _halves(whole, -2)
    if rows is None:
        return None
    top, bottom = (_halves(row, -1) for row in rows)
    if top is None or bottom is None or any(len(x.users) != 1 for x in (whole, *rows)):
        return None
    a, g = top
    zeros, b = bottom
    constant = all(isinstance(analysis[x], Constant) for x in (a, b, zeros))
    size = g.meta["val"].shape[-1]
    square = g.meta["val"].shape[-2] == size
    if not (constant and square and _is_zero(zeros) and _only_upper_right(node, size)):
        return None
    return Derivative(g, frozenset({node, whole, *rows}))


def _halves(node: Any, dim: int) -> tuple[fx.Node, fx.Node] | None:
    """The two equal parts that a node puts side by side along a dim, counted from the end."""
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default:
        return None
    parts: Any = node.args[0]
    along = node.args[1] if len(node.args) > 1 else 0
    ndim = node.meta["val"].ndim
    if len(parts) != 2 or along % ndim != dim % ndim:  # type: ignore[operator]
        return None
    first, second = parts
    return (first, second) if first.meta["val"].shape == second.meta["val"].shape else None


def _is_zero(node: fx.Node) -> bool:
    while node.target in _REARRANGES:
        node = node.args[0]  # type: ignore[assignment]
    return is_zero_fill(node)


def _only_upper_right(node: fx.Node, size: int) -> bool:
    return all(
        _slices(rows, -2, 0, size)
        and all(_slices(block, -1, size, 2 * size) for block in rows.users)
        for rows in node.users
    )


def _slices(node: fx.Node, dim: int, start: int, end: int) -> bool:
    if node.target is not aten.slice.Tensor or len(node.args) != 4 or node.kwargs:
        return False
    source, along, *bounds = node.args
    ndim = source.meta["val"].ndim  # type: ignore[union-attr]
    return along % ndim == dim % ndim and bounds == [start, end]  # type: ignore[operator]
