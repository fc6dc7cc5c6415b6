"""Every use of torch's private API, in one place: a torch upgrade is this file's work."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx


def size_expr(size: int | torch.SymInt) -> sympy.Expr:
    """Return a size as a sympy expression, without adding a guard."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(size)


def shape_exprs(shape: Sequence[int | torch.SymInt]) -> tuple[sympy.Expr, ...]:
    """Return a shape as sympy expressions, without adding a guard."""
    return tuple(size_expr(size) for size in shape)


def source_location(node: fx.Node) -> str:
    """Return the user's source line of a node ("file:line in function, code: ..."), or ""."""
    from torch.fx.graph import _parse_stack_trace

    trace = node.meta.get("stack_trace")
    if not trace:
        return ""
    parsed = _parse_stack_trace(trace)
    return "" if parsed is None else str(parsed.get_summary_str())
