"""Chains of reshapes and moves: whatever the chain, a claim must hold; usual ones must pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbation import batched, check, k

from flashnorm_compile.passes.batch_axis.sizes import quotient, surely_less

B0, B1, B2 = batched(0), batched(1), batched(2)
SCRAMBLES = "scrambles the batch axis"


def windows(t: torch.Tensor) -> torch.Tensor:
    """Partition [B, H, W, C] into Swin's windows [B * windows, 2, 2, C]."""
    b, h, w, c = t.shape
    t = t.view(b, h // 2, 2, w // 2, 2, c)
    return t.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 2, 2, c)


def and_back(t: torch.Tensor) -> torch.Tensor:
    t, (_, h, w, c) = windows(t), t.shape
    t = t.view(-1, h // 2, w // 2, 2, 2, c)
    return t.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h, w, c)


CHAINS: list[Any] = [
    (lambda t: t.reshape(-1, t.shape[-1]), (3, 3, 4), B0, "0*3"),
    (lambda t: t.transpose(0, 1).reshape(-1, t.shape[-1]), (3, 5, 4), B0, "5*0"),
    (lambda t: t.reshape(-1, 4).view(t.shape[0], -1, 2, 2).transpose(1, 2), (3, 3, 4), B0, B0),
    (lambda t: t.view(t.shape[0], -1, 2, 3).permute(0, 2, 1, 3), (3, 3, 6), B0, B0),
    (lambda t: t.view(t.shape[0], t.shape[1] * 2, 3).transpose(0, 1), (5, 3, 6), B1, "0*2"),
    (lambda t: t.flatten(1).unflatten(1, (3, 4)).mT, (3, 3, 4), B0, B0),
    (lambda t: t.reshape(t.shape[1], t.shape[0], -1), (3, 4, 2), B0, SCRAMBLES),
    (lambda t: t.mT.reshape(t.shape), (3, 4, 3), B2, SCRAMBLES),
    (windows, (3, 4, 4, 3), B0, "0*4"),
    (and_back, (3, 4, 4, 3), B0, B0),
    (lambda t: torch.roll(t, (-1, -1), (1, 2)), (3, 4, 4, 3), B0, B0),
    (lambda t: t.repeat(2, 1).view(2, -1, t.shape[1]), (3, 4), B0, B1),
    (lambda t: t.repeat_interleave(2, 0).view(-1, 2, t.shape[1]), (3, 4), B0, B0),
    (lambda t: torch.cat([t, t.flip(1)]).chunk(2)[1], (3, 4), B0, B0),
    (lambda t: torch.cat([t, t])[: t.shape[0]], (3, 4), B0, B0),
    (lambda t: torch.cat([t, t])[1:-1], (3, 4), B0, "takes some of the samples"),
    (lambda t: torch.stack([t, t], 1).flatten(0, 1), (3, 4), B0, "0*2"),
    (lambda t: t[:, None].expand(-1, 4, -1).reshape(-1, 3), (3, 3), B0, "0*4"),
    (lambda t: t.split([1, 3], -1)[1].sum(0), (5, 3, 4), B1, B0),
    (lambda t: t.unfold(1, 2, 2).reshape(t.shape[0], -1), (3, 4), B0, B0),
    (lambda t: t[..., ::2, 1:], (3, 4, 3), B0, B0),
    (lambda t: t[::1], (3, 4), B0, B0),
    (lambda t: t.squeeze().unsqueeze(1), (3, 1, 3), B0, B0),
]


def expected_axis(expected: Any) -> Any:
    """Read "0*3" as samples with an inner size of 3, "5*0" as an outer size of 5."""
    if not isinstance(expected, str) or "*" not in expected:
        return expected
    left, right = expected.split("*")
    return batched(0, inner=int(right)) if left == "0" else batched(0, outer=int(left))


@pytest.mark.parametrize(("fn", "shape", "axis", "expected"), CHAINS)
@pytest.mark.parametrize("decompose", [True, False])
def test_chain(fn: Callable, shape: tuple, axis: Any, expected: Any, decompose: bool) -> None:
    assert check(fn, (k(*shape),), (axis,), decompose=decompose) == expected_axis(expected)


@pytest.mark.parametrize(("fn", "shape", "axis", "expected"), CHAINS)
def test_chain_with_symbolic_sizes(fn: Callable, shape: tuple, axis: Any, expected: Any) -> None:
    assert check(fn, (k(*shape),), (axis,), symbolic=True) == expected_axis(expected)


def test_reading_beyond_a_view_is_refused() -> None:
    """The storage of a slice holds more than the slice."""

    def peek(t: torch.Tensor) -> torch.Tensor:
        return t[:3].as_strided((6, 4), (4, 1))

    assert check(peek, (k(6, 4),), (batched(0, outer=2),), decompose=False) == SCRAMBLES


sizes = st.sampled_from([1, 2, 3, 3, 4, 6])


@st.composite
def programs(draw: Any) -> tuple[list[tuple], tuple[int, ...], int]:
    """Draw a shape with a sample dim of size 3, and a chain of ops on it."""
    shape = draw(st.lists(sizes, min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape)))
    shape.insert(dim, 3)
    steps = draw(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.randoms()), max_size=6))
    return steps, tuple(shape), dim


def reshape(t: torch.Tensor, rng: Any) -> torch.Tensor:
    """Merge or split dims at random: the same numbers in the same order."""
    factors = [f for size in t.shape for f in ([2, size // 2] if size % 2 == 0 else [size])]
    shape: list[int] = []
    for factor in factors:
        if shape and rng.random() < 0.4:
            shape[-1] *= factor
        else:
            shape.append(factor)
    if rng.random() < 0.3:
        rng.shuffle(shape)
    return t.reshape(shape)


def permute(t: torch.Tensor, rng: Any) -> torch.Tensor:
    order = list(range(t.dim()))
    rng.shuffle(order)
    return t.permute(order)


def cut(t: torch.Tensor, rng: Any) -> torch.Tensor:
    dim = rng.randrange(t.dim())
    start = rng.choice([0, 0, 1, 3])
    return t.narrow(dim, min(start, t.shape[dim] - 1), max((t.shape[dim] - start) // 2, 1))


def along(op: Callable) -> Callable:
    return lambda t, rng: op(t, rng.randrange(t.dim()))


STEPS: dict[str, Callable] = {
    "reshape": reshape,
    "permute": permute,
    "cut": cut,
    "softmax": along(torch.softmax),
    "cumsum": along(torch.cumsum),
    "flip": along(lambda t, dim: t.flip(dim)),
    "sum": along(lambda t, dim: t.sum(dim, keepdim=True)),
    "repeat": along(lambda t, dim: torch.cat([t, t], dim)),
    "repeat_interleave": along(lambda t, dim: t.repeat_interleave(2, dim)),
    "unsqueeze": along(lambda t, dim: t.unsqueeze(dim)),
    "squeeze": lambda t, rng: t.squeeze() if t.squeeze().dim() else t,
    "add_transposed": lambda t, rng: t + t.transpose(0, -1) if t.shape[0] == t.shape[-1] else t,
    "product": lambda t, rng: t @ t.mT if t.dim() > 1 else t,
}


@settings(max_examples=60, deadline=None)
@given(programs())
def test_no_false_claim(program: tuple[list[tuple], tuple[int, ...], int]) -> None:
    steps, shape, dim = program

    def run(t: torch.Tensor) -> torch.Tensor:
        for name, rng in steps:
            if t.numel() < 2000:
                t = STEPS[name](t, rng)
        return t

    check(run, (k(*shape),), (batched(dim),))


s, t = sympy.symbols("s t", integer=True, positive=True)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (sympy.Integer(6), sympy.Integer(3), 2),
        (sympy.Integer(6), sympy.Integer(4), None),
        (6 * s * t, 3 * s, 2 * t),
        (s * t + s, s, t + 1),
        (s + 1, s, None),
        (s, sympy.Integer(2), None),
        (s, sympy.Integer(0), None),
        (s, t, None),
    ],
)
def test_quotients_are_exact_for_all_sizes(a: Any, b: Any, expected: Any) -> None:
    assert quotient(a, b) == expected


def test_surely_less_holds_for_all_sizes() -> None:
    assert surely_less(s - 1, s * t)
    assert surely_less(2 * (s - 1), 2 * s)
    assert not surely_less(s, t)
    assert not surely_less(s, s)
