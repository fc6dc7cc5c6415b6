"""The operations between a site and its gradient map over samples, however many there are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from flashnorm_compile._torch import size_expr
from flashnorm_compile.passes.emit import Emitter
from flashnorm_compile.passes.sample_map import run_mapped

aten, prims = torch.ops.aten, torch.ops.prims
END = 2**63 - 1


def run(target, *args, **kwargs):
    return run_mapped(target, args, kwargs)


def constant(*shape: int) -> Tensor:
    """Return an operand that all samples share."""
    return torch.arange(1.0, 1 + math.prod(shape)).cos().reshape(shape)


def rows(*shape: int) -> Tensor:
    """Return constant indices, the last two of them the same."""
    return torch.arange(1, 1 + math.prod(shape)).clamp(max=math.prod(shape) - 1).view(shape)


def weight_norm_backward(gradient: Tensor, dim: int) -> Tensor:
    v = constant(4, 6)
    norms = v.norm(dim=1 - dim, keepdim=True)
    g = norms.flip(dim)
    pair = run(aten._weight_norm_interface_backward.default, gradient, v, g, norms, dim)
    return run(aten.cat.default, list(pair), 1 - dim)


#: Name → (shapes of the operands that differ by sample, one sample's computation).
OPERATIONS = {
    "permute": ([(4, 5)], lambda s: run(aten.permute.default, s, [1, 0])),
    "view": ([(4, 6)], lambda s: run(aten.view.default, s, [8, 3])),
    "unsqueeze": ([(4, 6)], lambda s: run(aten.unsqueeze.default, s, 1)),
    "squeeze": ([(4, 1)], lambda s: run(aten.squeeze.dim, s, 1)),
    "clone": ([(4, 6)], lambda s: run(aten.clone.default, s)),
    "neg": ([(4, 6)], lambda s: run(aten.neg.default, s)),
    "add": ([(4, 6), (4, 6)], lambda s, t: run(aten.add.Tensor, s, t)),
    "add_constant": ([(4, 6)], lambda s: run(aten.add.Tensor, s, constant(4, 6))),
    "sub": ([(4, 6), (4, 6)], lambda s, t: run(aten.sub.Tensor, s, t)),
    "cat": ([(4, 6), (2, 6)], lambda s, t: run(aten.cat.default, [s, t])),
    "cat_constant": ([(4, 2)], lambda s: run(aten.cat.default, [s, constant(4, 1)], -1)),
    "stack": ([(4, 6), (4, 6)], lambda s, t: run(aten.stack.default, [s, t], 1)),
    "expand": ([(1, 6)], lambda s: run(aten.expand.default, s, [4, 6])),
    "slice": ([(4, 6)], lambda s: run(aten.slice.Tensor, s, 1, 2, END)),
    "select": ([(4, 6)], lambda s: run(aten.select.int, s, 1, 2)),
    "sum_dims": ([(4, 6, 2)], lambda s: run(aten.sum.dim_IntList, s, [0, 2], True)),
    "sum": ([(4, 6)], lambda s: run(aten.sum.default, s)),
    "mean_dim": ([(4, 6)], lambda s: run(aten.mean.dim, s, [1])),
    "mean": ([(4, 6)], lambda s: run(aten.mean.default, s)),
    "flip": ([(4, 6)], lambda s: run(aten.flip.default, s, [1])),
    "roll": ([(4, 6)], lambda s: run(aten.roll.default, s, [2], [1])),
    "tril": ([(4, 6)], lambda s: run(aten.tril.default, s)),
    "triu": ([(4, 6)], lambda s: run(aten.triu.default, s, 1)),
    "diagonal": ([(4, 6)], lambda s: run(aten.diagonal.default, s)),
    "cumsum": ([(4, 6)], lambda s: run(aten.cumsum.default, s, 1)),
    "repeat": ([(4, 6)], lambda s: run(aten.repeat.default, s, [2, 1])),
    "as_strided": ([(4, 6)], lambda s: run(aten.as_strided.default, s, [3, 2], [6, 2], 1)),
    "index": ([(4, 6)], lambda s: run(aten.index.Tensor, s, [None, rows(4)])),
    "index_select": ([(4, 6)], lambda s: run(aten.index_select.default, s, 1, rows(4))),
    "gather": ([(4, 6)], lambda s: run(aten.gather.default, s, 1, rows(4)[:, None])),
    "unfold": ([(4, 6)], lambda s: run(aten.unfold.default, s, 1, 3, 2)),
    "div_number": ([(4, 6)], lambda s: run(aten.div.Scalar, s, 3.0)),
    "mul_number": ([(4, 6)], lambda s: run(aten.mul.Scalar, s, 3.0)),
    "mul": ([(4, 6)], lambda s: run(aten.mul.Tensor, constant(6), s)),
    "div": ([(4, 6)], lambda s: run(aten.div.Tensor, s, constant(4, 1))),
    "addcmul": ([(4, 6), (4, 6)],
                lambda s, t: run(aten.addcmul.default, s, t, constant(6), value=2)),
    "fma": ([(4, 6), (4, 6)], lambda s, t: run(prims.fma.default, constant(6), s, t)),
    "mm_left": ([(4, 6)], lambda s: run(aten.mm.default, s, constant(6, 3).bfloat16())),
    "mm_right": ([(4, 6)], lambda s: run(aten.mm.default, constant(3, 4), s)),
    "bmm": ([(2, 4, 6)], lambda s: run(aten.bmm.default, constant(2, 3, 4), s)),
    "dot": ([(6,), (6,)], lambda s, t: run(aten.dot.default, s, t)),
    "mv": ([(6,)], lambda s: run(aten.mv.default, constant(4, 6), s)),
    "where": ([(4, 6)], lambda s: run(aten.where.self, constant(4, 6) > 0, s, constant())),
    "pad": ([(4, 6)], lambda s: run(aten.constant_pad_nd.default, s, [1, 2, 0, 1])),
    "index_put": ([(4, 6)],
                  lambda s: run(aten.index_put.default, constant(5, 6), [rows(4)], s, True)),
    "masked_index_put": (
        [(4, 6)], lambda s: run(aten._unsafe_masked_index_put_accumulate.default,
                                constant(5, 6), (rows(4) > 1)[:, None], [rows(4)], s)),
    "scatter_add": ([(4, 6)], lambda s: run(aten.scatter_add.default, constant(5, 6), 0,
                                            rows(4)[:, None].expand(4, 6), s)),
    "slice_scatter": ([(4, 2)],
                      lambda s: run(aten.slice_scatter.default, constant(4, 6), s, 1, 4, END)),
    "slice_scatter_steps": (
        [(4, 3)], lambda s: run(aten.slice_scatter.default, constant(4, 6), s, -1, 1, 6, 2)),
    "slice_scatter_both": (
        [(4, 6), (3, 6)], lambda s, t: run(aten.slice_scatter.default, s, t, 0, None, 3)),
    "select_scatter": ([(4,)],
                       lambda s: run(aten.select_scatter.default, constant(4, 6), s, 1, -2)),
    "embedding_dense_backward": (
        [(4, 6)], lambda s: run(aten.embedding_dense_backward.default, s, rows(4), 5, 1, False)),
    "embedding_dense_backward_two_dims": (
        [(2, 2, 6)], lambda s: run(aten.embedding_dense_backward.default, s, rows(2, 2),
                                   5, -1, False)),
    "weight_norm_rows": ([(4, 6)], lambda s: weight_norm_backward(s, 0)),
    "weight_norm_columns": ([(4, 6)], lambda s: weight_norm_backward(s, 1)),
}


def emit_mapped(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]):
    """Write ``vmap(function)`` into a graph whose operands have a symbolic number of samples."""
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = fx.Graph()
    operands = []
    for i, shape in enumerate(shapes):
        operand = graph.placeholder(f"operand_{i}")
        dims = [DimDynamic.DUCK, *[DimDynamic.STATIC] * len(shape)]
        operand.meta["val"] = fake_mode.from_tensor(
            torch.empty(7, *shape),
            source=ConstantSource(operand.name),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims),
        )
        operands.append(operand)
    output = graph.output(operands[0])
    output.args = (Emitter(graph)(torch.func.vmap(function), *operands, before=output),)
    return fx.GraphModule({}, graph), [size_expr(x.meta["val"].shape[0]) for x in operands]


def loops_over_samples(graph: fx.Graph) -> bool:
    return any(node.target is aten.unbind.int for node in graph.nodes)


@pytest.mark.parametrize("name", OPERATIONS)
def test_maps_over_any_number_of_samples(name):
    shapes, function = OPERATIONS[name]
    graph, sizes = emit_mapped(function, shapes)
    assert all(size.is_Symbol for size in sizes), f"specialised to {sizes} samples"
    assert not loops_over_samples(graph.graph), "one piece of code per sample"
    for size in (3, 5):
        operands = [torch.randn(size, *shape) for shape in shapes]
        samples = zip(*([row.clone() for row in operand] for operand in operands), strict=True)
        one_by_one = torch.stack([function(*sample) for sample in samples])
        torch.testing.assert_close(graph(*operands), one_by_one)


def test_weight_norm_backward_is_torchs():
    gradient, v, g = constant(4, 6, 3).flip(0), constant(4, 6, 3), constant(4, 1, 1)
    norms = v.norm(dim=(1, 2), keepdim=True)
    arguments = (gradient, v, g, norms, 0)
    target = aten._weight_norm_interface_backward.default
    torch.testing.assert_close(run(target, *arguments), target(*arguments))
