"""Which exponentials are derivatives of one, and so linear; and what is made of them."""

from __future__ import annotations

import pytest
import torch
from perturbation import k, trace

from flashnorm_compile.passes.batch_axis import Constant, Mixed, analyze
from flashnorm_compile.passes.matrix_exp import match_derivative

N = 3


def by_autograd(a, g):
    return torch.func.vjp(torch.linalg.matrix_exp, a)[1](g)[0]


def block(a, g, b, zeros, rows=slice(0, N), columns=slice(N, 2 * N)):
    whole = torch.cat([torch.cat([a, g], -1), torch.cat([zeros, b], -1)], -2)
    return torch.linalg.matrix_exp(whole)[..., rows, :][..., columns]


def by_hand(a, g):
    return block(a, g, a, torch.zeros_like(a))


def two_generators(a, g):
    return block(a, g, 2 * a, torch.zeros_like(a))


def matched(function, a=None, g=None):
    """Trace a function of a constant and of a sum over samples; tell whether it is recognised."""
    gm = trace(function, (k(N, N) if a is None else a, k(N, N) + 1 if g is None else g))
    constant, direction = (node for node in gm.graph.nodes if node.op == "placeholder")
    analysis = analyze(
        gm.graph, {constant: Constant(), direction: Mixed(direction, "a sum over samples")}, 4
    )
    exponentials = gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten.linalg_matrix_exp.default
    )
    found = match_derivative(exponentials[-1], analysis)
    assert found is None or found.direction is direction
    return found is not None


@pytest.mark.parametrize("function", [by_autograd, by_hand, two_generators])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_derivatives_are_recognised_and_linear(function, lead):
    a, g, h = k(*lead, N, N), k(*lead, N, N) + 1, k(*lead, N, N) ** 2
    assert matched(function, a, g)
    torch.testing.assert_close(
        function(a, 2 * g - 3 * h), 2 * function(a, g) - 3 * function(a, h)
    )


@pytest.mark.parametrize("function", [
    lambda a, g: torch.linalg.matrix_exp(g),
    lambda a, g: block(a, g, a, a),
    lambda a, g: block(a, g, a, torch.ones_like(a)),
    lambda a, g: block(a, a, g, torch.zeros_like(a)),
    lambda a, g: block(g, a, a, torch.zeros_like(a)),
    lambda a, g: block(g, g, a, torch.zeros_like(a)),
    lambda a, g: block(a, g, a, torch.zeros_like(a), columns=slice(N - 1, 2 * N - 1)),
    lambda a, g: block(a, g, a, torch.zeros_like(a), columns=slice(0, N)),
    lambda a, g: block(a, g, a, torch.zeros_like(a), rows=slice(0, 2 * N)),
    lambda a, g: block(a, g, a, torch.zeros_like(a), rows=slice(1, N + 1)),
])
def test_other_exponentials_are_not(function):
    assert not matched(function)


def test_whole_exponential_used_beside_its_block():
    def both(a, g):
        whole = torch.cat(
            [torch.cat([a, g], -1), torch.cat([torch.zeros_like(a), a], -1)], -2
        )
        exponential = torch.linalg.matrix_exp(whole)
        return exponential[:N, N:] + exponential[:N, :N]

    assert not matched(both)


def test_blocks_used_elsewhere():
    def both(a, g):
        top = torch.cat([a, g], -1)
        whole = torch.cat([top, torch.cat([torch.zeros_like(a), a], -1)], -2)
        return torch.linalg.matrix_exp(whole)[:N, N:] + top[:, :N]

    assert not matched(both)
