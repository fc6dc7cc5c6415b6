"""Division of sizes by sizes, rounded up."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """Return the first multiple of b that is not below a."""
    return cdiv(a, b) * b
