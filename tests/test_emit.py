"""Snippets are traced once where they are alike, and only there."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from flashnorm_compile.passes.emit import Emitter


class Program:
    """A graph of two matrices and a vector, to which snippets are added."""

    def __init__(self):
        self.inputs = torch.randn(3, 3), torch.randn(3, 3), torch.randn(3)
        self.gm = make_fx(lambda x, y, z: (x + 0,), tracing_mode="symbolic")(*self.inputs)
        self.x, self.y, self.z = self.gm.graph.find_nodes(op="placeholder")
        self.emitter = Emitter(self.gm.graph)
        self.traced = 0
        trace = self.emitter._trace

        def counted(function, args):
            self.traced += 1
            return trace(function, args)

        self.emitter._trace = counted

    def emit(self, function, *args):
        return self.emitter(function, *args, before=self.gm.graph.output_node())

    def results(self, *nodes: fx.Node):
        self.gm.graph.output_node().args = (nodes,)
        self.gm.recompile()
        return self.gm(*self.inputs)


def scaled_by(factor):
    return lambda x: x * factor


def test_snippets_that_are_alike_are_traced_once():
    program = Program()
    nodes = [program.emit(scaled_by(2.0), node) for node in (program.x, program.y)]
    assert program.traced == 1
    x, y, _ = program.inputs
    for actual, expected in zip(program.results(*nodes), (2 * x, 2 * y), strict=True):
        assert torch.equal(actual, expected)


@dataclass(frozen=True)
class Frozen:
    factor: float

    def __call__(self, x):
        return x * self.factor


def times(factor):
    return lambda x: factor(x)


@pytest.mark.parametrize(("first", "second"), [
    (scaled_by(2.0), scaled_by(3.0)),
    (scaled_by(2), scaled_by(True)),  # 1 == True, and it is another dtype's product
    (scaled_by(1), scaled_by(1.0)),
    (times(Frozen(2.0)), times(Frozen(3.0))),
    (times(scaled_by(2.0)), times(scaled_by(3.0))),
    (lambda x, by=2.0: x * by, lambda x, by=3.0: x * by),
])
def test_what_a_snippet_closes_over_tells_it_apart(first, second):
    program = Program()
    nodes = program.emit(first, program.x), program.emit(second, program.x)
    assert program.traced == 2
    for actual, function in zip(program.results(*nodes), (first, second), strict=True):
        assert torch.equal(actual, function(program.inputs[0]))


def test_one_value_twice_is_not_two_values():
    program, (x, y, _) = Program(), Program().inputs

    def minus(a, b):
        return a - 2 * b

    same, other = program.emit(minus, program.x, program.x), program.emit(
        minus, program.x, program.y
    )
    x, y, _ = program.inputs
    actual = program.results(same, other)
    assert torch.equal(actual[0], x - 2 * x)
    assert torch.equal(actual[1], x - 2 * y)


def test_sizes_dtypes_and_strides_tell_snippets_apart():
    program = Program()
    half = program.emit(lambda x: x.half(), program.x)
    turned = program.emit(lambda x: x.mT, program.x)
    before = program.traced
    for node in (program.x, program.z, half, turned):
        program.emit(scaled_by(2.0), node)
    assert program.traced == before + 4


def test_results_of_one_snippet_are_values_of_their_own():
    """Tracing takes two nodes for one where they hold one value."""
    program = Program()
    first, second = (program.emit(scaled_by(2.0), node) for node in (program.x, program.y))
    difference = program.emit(lambda a, b: a - b, first, second)
    x, y, _ = program.inputs
    assert torch.equal(program.results(difference)[0], 2 * x - 2 * y)


def test_a_snippet_that_depends_on_an_object_is_always_traced():
    class Mutable:
        factor = 2.0

    program, box = Program(), Mutable()
    first = program.emit(lambda x: x * box.factor, program.x)
    box.factor = 3.0
    second = program.emit(lambda x: x * box.factor, program.x)
    actual = program.results(first, second)
    assert torch.equal(actual[0], 2 * program.inputs[0])
    assert torch.equal(actual[1], 3 * program.inputs[0])
