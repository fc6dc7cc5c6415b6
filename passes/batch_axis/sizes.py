"""Exact arithmetic on sizes. All sizes are sympy expressions, so nothing here adds a guard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sympy


def product(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    """Return the product of sizes (1 for none)."""
    return sympy.Integer(1) if not (factors := list(sizes)) else sympy.expand(sympy.Mul(*factors))


def same(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Tell whether two sizes are provably equal."""
    return a == b or sympy.expand(a - b) == 0


def quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """Return ``a / b`` where ``b`` provably divides ``a`` for all sizes, else None."""
    if isinstance(a, sympy.Integer) and isinstance(b, sympy.Integer):
        return sympy.Integer(int(a) // int(b)) if b != 0 and int(a) % int(b) == 0 else None
    if b == 0:
        return None
    try:
        ratio = sympy.cancel(a / b)
    except sympy.PolynomialError:  # sizes with conditions in them
        return None
    _, denominator = sympy.fraction(sympy.together(ratio))
    return sympy.expand(ratio) if denominator == 1 else None


def surely_less(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Tell whether ``a < b`` for all sizes that are at least 1.

    Writes every symbol as ``1 + y``; ``b - a - 1`` is then a polynomial in ``y >= 0``, and is
    nonnegative if all of its coefficients are.
    """
    gap = b - a - 1
    symbols = sorted(gap.free_symbols, key=str)
    if not symbols:
        return bool(gap >= 0)
    shifted = sympy.expand(gap.subs({s: 1 + s for s in symbols}, simultaneous=True))
    if not shifted.is_polynomial(*symbols):
        return False
    return all(c.is_number and c >= 0 for c in sympy.Poly(shifted, *symbols).coeffs())


def row_major_strides(shape: Sequence[sympy.Expr]) -> tuple[sympy.Expr, ...]:
    """Return the strides of a contiguous tensor of this shape."""
    return tuple(product(shape[dim + 1 :]) for dim in range(len(shape)))


def depends_on_data(sizes: Iterable[sympy.Expr]) -> bool:
    """Tell whether a size is read from a tensor's values (an unbacked symbol, u0 or zuf0)."""
    names = (str(symbol) for size in sizes for symbol in size.free_symbols)
    return any(name.startswith(("u", "zu")) for name in names)


def as_int(size: sympy.Expr) -> int | None:
    """Return a size as an int if it is a plain number."""
    return int(size) if isinstance(size, sympy.Integer) else None
