"""Checks the batch-axis analysis by experiment: change one sample, see what changes.

A graph is run twice, on inputs that differ in one sample only. Every node that was called
constant must not change, and every node that was called batched may change only in the slices
of that sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
import torch._inductor.lowering  # registers ops that decompositions use
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils import _pytree as pytree

from flashnorm_compile.passes.batch_axis import Analysis, Batched, Constant, Mixed, Value, analyze

SAMPLE = 1


@dataclass
class At:
    """A tensor with its batch axis, for `check_op`."""

    tensor: torch.Tensor
    axis: Batched


def at(tensor: torch.Tensor, dim: int, outer: int = 1, inner: int = 1) -> At:
    """Mark the batch axis of a tensor."""
    return At(tensor, Batched(dim, sympy.Integer(outer), sympy.Integer(inner)))


def batched(dim: int, outer: int = 1, inner: int = 1) -> Batched:
    """Return a batch axis with plain numbers."""
    return Batched(dim, sympy.Integer(outer), sympy.Integer(inner))


def x(*shape: int, dim: int = 0, outer: int = 1, inner: int = 1) -> At:
    """Return a random tensor with a batch axis."""
    return at(k(*shape), dim, outer, inner)


def k(*shape: int) -> torch.Tensor:
    """Return a random constant."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def ints(*shape: int, high: int = 3) -> torch.Tensor:
    """Return constant integers below `high`."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, high, shape, generator=generator)


def mask(*shape: int) -> torch.Tensor:
    """Return a constant random mask."""
    return ints(*shape, high=2).bool()


def case(op: Any, *args: Any, to: Any, **kwargs: Any) -> Any:
    """Return a test case for `check_op`."""
    return pytest.param(op, args, kwargs, to, id=str(op))


def trace(
    fn: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    *,
    symbolic: bool | Sequence[int | None] = False,
    decompose: bool = True,
) -> fx.GraphModule:
    """Trace a function to ATen ops.

    Args:
        fn: The function.
        inputs: Example inputs.
        symbolic: Whether all sizes are symbolic, or for each input the one dim that is.
        decompose: Whether to use Inductor's decompositions.
    """
    table = select_decomp_table() if decompose else {}
    if isinstance(symbolic, bool):
        mode = "symbolic" if symbolic else "real"
        return make_fx(fn, decomposition_table=table, tracing_mode=mode)(*inputs)
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [_one_symbolic(fake_mode, t, dim) for t, dim in zip(inputs, symbolic, strict=True)]
    with fake_mode:  # constants made inside have symbolic sizes too
        return make_fx(fn, decomposition_table=table)(*fakes)


def _one_symbolic(mode: FakeTensorMode, tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
    dims = [DimDynamic.DUCK if i == dim else DimDynamic.STATIC for i in range(tensor.dim())]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dims))


def check(
    fn: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    seeds: Sequence[Value],
    *,
    batch: int = 3,
    symbolic: bool = False,
    decompose: bool = True,
) -> Any:
    """Trace, analyze and perturb a function; return what its outputs are.

    With `symbolic`, the batch dims (and no others) have a symbolic size.
    """
    dims = [seed.dim if isinstance(seed, Batched) else None for seed in seeds]
    gm = trace(fn, inputs, symbolic=dims if symbolic else False, decompose=decompose)
    analysis = check_graph(gm, inputs, seeds, batch=batch)
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    return fx.map_arg(output.args[0], lambda node: _plain(analysis[node]))


def check_op(op: Any, *args: Any, batch: int = 3, **kwargs: Any) -> Any:
    """Check one op as it is, with `At` for arguments that have a batch axis."""
    graph, inputs, seeds = one_op(FakeTensorMode(), op, args, kwargs)
    analysis = check_graph(fx.GraphModule({}, graph), inputs, list(seeds.values()), batch=batch)
    return _plain(analysis[list(graph.nodes)[-2]])


def verdict(op: Any, *args: Any, batch: int = 3, **kwargs: Any) -> Any:
    """Analyze one op on fake tensors, which cannot run."""
    graph, _, seeds = one_op(detect_fake_mode(), op, args, kwargs)
    return _plain(analyze(graph, seeds, batch)[list(graph.nodes)[-2]])


def one_op(
    fake_mode: FakeTensorMode, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[fx.Graph, list[torch.Tensor], dict[fx.Node, Value]]:
    """Build the graph of one call."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    graph, inputs, seeds, flat = fx.Graph(), [], {}, []
    for leaf in leaves:
        tensor = leaf.tensor if isinstance(leaf, At) else leaf
        if isinstance(tensor, torch.Tensor):
            node = graph.placeholder(f"x{len(inputs)}")
            fake = isinstance(tensor, FakeTensor)
            node.meta["val"] = tensor if fake else fake_mode.from_tensor(tensor)
            inputs.append(tensor)
            seeds[node] = leaf.axis if isinstance(leaf, At) else Constant()
            leaf = node
        flat.append(leaf)
    node_args, node_kwargs = pytree.tree_unflatten(flat, spec)
    result = graph.call_function(op, tuple(node_args), node_kwargs)
    fakes = [leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf for leaf in flat]
    fake_args, fake_kwargs = pytree.tree_unflatten(fakes, spec)
    with fake_mode:
        result.meta["val"] = op(*fake_args, **fake_kwargs)
    graph.output(result)
    return graph, inputs, seeds


def check_graph(
    gm: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    seeds: Sequence[Value],
    *,
    batch: int = 3,
    tangent_of: Mapping[fx.Node, fx.Node] | None = None,
) -> Analysis:
    """Analyze a graph and hold every claim against two runs."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    tangent_of = tangent_of or {}
    pairs = zip(placeholders, seeds, strict=False)
    seed_of = {node: value for node, value in pairs if node not in tangent_of}
    size = _symbolic_batch(seed_of, batch)
    analysis = analyze(gm.graph, seed_of, size, tangent_of)
    values = [analysis.values[node] for node in placeholders]
    before = run(gm, inputs)
    after = run(gm, [perturb(x, v, batch) for x, v in zip(inputs, values, strict=True)])
    assignment = _assignment(placeholders, inputs)
    for node in gm.graph.nodes:
        if node.op != "output" and "empty" not in str(node.target):
            _compare(node, analysis[node], before[node], after[node], batch, assignment)
    return analysis


def _symbolic_batch(seeds: Mapping[fx.Node, Value], batch: int) -> Any:
    plain = (n for n, v in seeds.items() if isinstance(v, Batched) and v == batched(v.dim))
    first = next(plain, None)
    return batch if first is None else first.meta["val"].shape[seeds[first].dim]


def _assignment(placeholders: Sequence[fx.Node], inputs: Sequence[Any]) -> dict[Any, int]:
    """Return the number that each size symbol stands for in these inputs."""
    found: dict[Any, int] = {}
    for node, tensor in zip(placeholders, inputs, strict=True):
        val = node.meta.get("val")
        pairs = zip(getattr(val, "shape", (val,)), getattr(tensor, "shape", (tensor,)), strict=True)
        for size, number in pairs:
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found[size.node.expr] = number
    return found


def run(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """Run a graph and return the value of every node, with the same random numbers each time."""

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = pytree.tree_map(_copy, result := super().run_node(n))
            return result

    seen: dict[fx.Node, Any] = {}
    torch.manual_seed(0)
    with torch.no_grad():
        Recorder(gm).run(*(_copy(x) for x in inputs))
    return seen


def _copy(x: Any) -> Any:
    return _with_strides(x, x) if isinstance(x, torch.Tensor) else x


def _with_strides(content: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return a copy laid out in memory as the model (`as_strided` sees the difference)."""
    if 0 in model.stride() or model.numel() == 0:
        return content.clone()
    copy = torch.empty_strided(model.shape, model.stride(), dtype=model.dtype, device=model.device)
    return copy.copy_(content)


def perturb(tensor: torch.Tensor, value: Value, batch: int) -> torch.Tensor:
    """Give one sample of a batched tensor other contents, of the same kind and range."""
    if not isinstance(value, Batched):
        return tensor
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(tensor.numel(), generator=generator)
    other = tensor.reshape(-1)[order.to(tensor.device)].reshape(tensor.shape)
    if tensor.dtype.is_floating_point:
        other = other * 0.9 + 0.01  # stays in (0, 1) where it was
    elif tensor.dtype == torch.bool:
        other = ~tensor
    return _with_strides(torch.where(slices(tensor, value, batch), other, tensor), tensor)


def slices(
    tensor: torch.Tensor, axis: Batched, batch: int, sizes: Mapping[Any, int] | None = None
) -> torch.Tensor:
    """Return the mask of the entries that belong to the perturbed sample."""
    outer, inner = (int(e.subs(sizes or {})) for e in (axis.outer, axis.inner))
    size = tensor.shape[axis.dim]
    assert size == outer * batch * inner, f"{axis} claims a size of {size}"
    mask = torch.zeros(outer, batch, inner, dtype=torch.bool, device=tensor.device)
    mask[:, SAMPLE] = True
    shape = [1] * tensor.dim()
    shape[axis.dim] = size
    return mask.reshape(shape).expand(tensor.shape)


def _compare(
    node: fx.Node, value: Value, before: Any, after: Any, batch: int, sizes: Mapping[Any, int]
) -> None:
    if isinstance(value, Mixed):
        return
    if isinstance(value, tuple):
        for item, a, b in zip(value, before, after, strict=True):
            _compare(node, item, a, b, batch, sizes)
        return
    if isinstance(before, (list, tuple)):
        for a, b in zip(before, after, strict=True):
            _compare(node, value, a, b, batch, sizes)
        return
    if not isinstance(before, torch.Tensor):
        assert isinstance(value, Constant)
        assert before == after, f"{node.format_node()} is called constant"
        return
    assert before.shape == after.shape
    changed = ~torch.isclose(before, after, rtol=1e-6, atol=1e-9, equal_nan=True)
    if isinstance(value, Batched):
        changed = changed & ~slices(before, value, batch, sizes)
    assert not changed.any(), f"{node.format_node()} is called {value}"


def _plain(value: Value) -> Any:
    """Return a value for comparison; of a mixed one, its reason."""
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value.reason if isinstance(value, Mixed) else value
