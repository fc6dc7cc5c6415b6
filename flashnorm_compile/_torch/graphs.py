"""Reading graphs: sizes as expressions, source lines, side effects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloatTrueDiv, FloorDiv, IntTrueDiv, ToFloat


def size_expr(size: int | torch.SymInt) -> sympy.Expr:
    """Return a size as a sympy expression, without adding a guard."""
    if isinstance(size, torch.SymInt):
        return size.node.expr.replace(FloorDiv, _divide)
    return sympy.Integer(size)


def hint(size: int | torch.SymInt) -> int:
    """Return the size that was traced with."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint if size.node.hint is not None else 1)
    return int(size)


def number_expr(value: int | float | torch.SymInt | torch.SymFloat | torch.SymBool) -> sympy.Expr:
    """Return a number computed from sizes as a sympy expression, without adding a guard."""
    if isinstance(value, torch.SymInt):
        return size_expr(value)
    if not isinstance(value, (torch.SymFloat, torch.SymBool)):
        return sympy.sympify(value)
    expr = value.node.expr.replace(ToFloat, lambda size: size)
    return expr.replace(FloatTrueDiv, _quotient).replace(IntTrueDiv, _quotient)


def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return a / b


def _divide(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """Write a division without a rest as such: a view of h² elements as [h, h²//h]."""
    if not (a.is_polynomial() and b.is_polynomial()):
        return FloorDiv(a, b)
    ratio = sympy.together(sympy.cancel(a / b))
    return sympy.expand(ratio) if sympy.denom(ratio) == 1 else FloorDiv(a, b)


def shape_exprs(shape: Sequence[int | torch.SymInt]) -> tuple[sympy.Expr, ...]:
    """Return a shape as sympy expressions, without adding a guard."""
    return tuple(size_expr(size) for size in shape)


def source_location(node: fx.Node) -> str:
    """Return the user's source line of a node ("File: f.py:3 in step, code: ..."), or ""."""
    from torch.fx.graph import _parse_stack_trace

    trace = node.meta.get("stack_trace")
    if not trace:
        return ""
    parsed = _parse_stack_trace(trace)
    return "" if parsed is None else f"{parsed.file}:{parsed.lineno}, code: {parsed.code}"


def fix_size(size: torch.SymInt) -> None:
    """Make a symbolic size the number that it is in this call, by a guard."""
    int(size)


def called_in(node: fx.Node) -> Any | None:
    """Return the function that the user called and a node comes from; None if not known."""
    stack = node.meta.get("source_fn_stack")
    return stack[-1][1] if stack else None


def effect_of(node: fx.Node) -> Any | None:
    """Return the op that a node runs for its side effect, in order; None for any other node."""
    from torch._higher_order_ops.effects import with_effects

    return node.args[1] if node.target is with_effects else None


def is_in_place(node: fx.Node) -> bool:
    """Return whether a node's operation writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
