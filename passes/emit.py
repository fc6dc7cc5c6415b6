"""Write PyTorch code into a graph: trace a function on a graph's values and splice the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from flashnorm_compile._torch import (
    another_fake,
    decompositions,
    detect_fake_mode,
    size_expr,
    symbolic_tracing,
)


class Emitter:
    """Splices traced snippets into a joint graph.

    Snippets are ordinary functions of tensors. They are traced with Inductor's decompositions, so
    that the graph holds only operations that Inductor lowers, and marked as backward: a Gram
    matrix of activations must not be computed, and kept, in the forward. Layers are often alike:
    a snippet that is known by its recipe is not traced again.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._snippets: dict[Hashable, fx.GraphModule] = {}
        self._fake_mode = detect_fake_mode(
            [node.meta["val"] for node in graph.nodes if "val" in node.meta]
        )

    def __call__(
        self, function: Callable[..., Any], *args: Any, before: fx.Node, like: fx.Node | None = None
    ) -> Any:
        """Insert ``function(*args)`` before a node and return the node(s) of its result.

        Args:
            function: takes tensors for the nodes among ``args``; other args pass through.
            args: nodes and plain values.
            before: where the code goes.
            like: the node whose source line the code carries (default: ``before``).
        """
        meta = _kept(like or before, _PROVENANCE) | {"partitioner_tag": "must_be_in_backward"}
        return self._insert(function, args, before, meta)

    def replace(self, node: fx.Node, function: Callable[..., torch.Tensor]) -> None:
        """Put ``function`` of a node's arguments in its place, forward or backward as it was."""
        result = self._insert(function, node.args, node, _kept(node, _PROVENANCE + _PLACE))
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)

    def _insert(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        before: fx.Node,
        meta: dict[str, Any],
    ) -> Any:
        nodes = [arg for arg in args if isinstance(arg, fx.Node)]
        recipe = _recipe(function, args)
        snippet = self._snippets.get(recipe)
        if snippet is None:
            snippet = self._trace(function, args)
            if recipe is not None:
                self._snippets[recipe] = snippet
        return self._splice(snippet, nodes, before, meta)

    def _trace(self, function: Callable[..., Any], args: Sequence[Any]) -> fx.GraphModule:
        positions = [i for i, arg in enumerate(args) if isinstance(arg, fx.Node)]

        def traced(*tensors: torch.Tensor) -> Any:
            values = list(args)
            for position, tensor in zip(positions, tensors, strict=True):
                values[position] = tensor
            return function(*values)

        with symbolic_tracing(self._fake_mode), torch.no_grad():
            snippet = make_fx(traced, decomposition_table=dict(decompositions()))(
                *(args[position].meta["val"] for position in positions)
            )
        snippet.graph.eliminate_dead_code()
        _refuse_writes_into_expanded(snippet.graph)
        return snippet

    def _splice(
        self,
        snippet: fx.GraphModule,
        nodes: Sequence[fx.Node],
        before: fx.Node,
        meta: dict[str, Any],
    ) -> Any:
        mapping: dict[fx.Node, Any] = dict(
            zip(snippet.graph.find_nodes(op="placeholder"), nodes, strict=True)
        )
        with self.graph.inserting_before(before):
            for node in snippet.graph.nodes:
                if node.op == "call_function":
                    copy = self.graph.node_copy(node, lambda source: mapping[source])
                    # Of its own: tracing takes nodes with one value object for one node.
                    value = pytree.tree_map_only(torch.Tensor, another_fake, node.meta["val"])
                    copy.meta = {"val": value, **meta}
                    if "tensor_meta" in node.meta:
                        copy.meta["tensor_meta"] = node.meta["tensor_meta"]
                    mapping[node] = copy
                elif node.op == "get_attr":
                    raise AssertionError(
                        f"a snippet made a tensor constant at {node.name}; build it from arguments"
                    )
        result = snippet.graph.output_node().args[0]
        return torch.fx.map_arg(result, lambda source: mapping[source])


def _recipe(function: Callable[..., Any], args: Sequence[Any]) -> Hashable | None:
    """Identify all that a snippet depends on; None where that is not plain data.

    Two calls with one recipe give one snippet, up to the nodes it reads: the code, what it closes
    over, and what is known of its tensors, of which two may be one.
    """
    try:
        same = tuple(args.index(arg) for arg in args if isinstance(arg, fx.Node))
        values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
        return (_identity(function), _identity(values), same)
    except _NotPlainError:
        return None


class _NotPlainError(Exception):
    """A value whose behaviour does not follow from its parts."""


def _identity(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return (value.ndim, value.dtype, value.device, *map(_identity, sizes))
    if isinstance(value, torch.SymInt):
        return size_expr(value)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return (value.__code__, *map(_identity, parts))
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_identity, value))
    if dataclasses.is_dataclass(value) and type(value).__dataclass_params__.frozen:  # type: ignore[attr-defined]
        fields = (getattr(value, field.name) for field in dataclasses.fields(value))
        return (type(value), *map(_identity, fields))
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (type(value), value)
    raise _NotPlainError


_WRITES = {
    torch.ops.aten.index_put,
    torch.ops.aten._unsafe_index_put,
    torch.ops.aten.scatter_add,
    torch.ops.aten.scatter,
    torch.ops.aten.index_add,
    torch.ops.aten.slice_scatter,
    torch.ops.aten.select_scatter,
}


def _refuse_writes_into_expanded(graph: fx.Graph) -> None:
    """Guard against a miscompilation: Inductor makes such a write one in place."""
    for node in graph.nodes:
        if getattr(node.target, "overloadpacket", None) not in _WRITES:
            continue
        value = node.args[0].meta["val"]
        if any(
            stride == 0 and size_expr(size) != 1
            for stride, size in zip(value.stride(), value.shape, strict=True)
            if isinstance(stride, int)
        ):
            raise AssertionError(f"{node.target} writes into an expanded tensor; give it its own")


_PROVENANCE = ("stack_trace", "nn_module_stack")
# What tells the partitioner where a node goes, and whether a checkpoint recomputes it.
_PLACE = ("seq_nr", "partitioner_tag", "recompute", "ac_graph_id")


def _kept(node: fx.Node, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: node.meta[key] for key in keys if key in node.meta}


def half_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Batched or plain matrix product with a float32 result.

    Half-precision products accumulate in float32; keeping the result there costs nothing on a
    GPU. Elsewhere the operands are converted first.

    Args:
        left: [..., m, k], 2-d to 4-d.
        right: [..., k, n].
    """
    if left.dtype == torch.float32 or left.dtype == torch.float64:
        return torch.matmul(left, right.to(left.dtype))
    if not left.is_cuda:
        return torch.matmul(left.float(), right.float())
    right = right.to(left.dtype)
    if left.ndim == 2:
        return torch.ops.aten.mm.dtype(left, right, torch.float32)
    lead = left.shape[:-2]
    product = torch.ops.aten.bmm.dtype(
        left.reshape(-1, *left.shape[-2:]), right.reshape(-1, *right.shape[-2:]), torch.float32
    )
    return product.reshape(*lead, *product.shape[-2:])
