"""In-place writes: a tensor read after it was overwritten is no longer what it was.

Joint graphs are functional but for `copy_` to inputs at their end; the analysis must still
not be wrong about others.
"""

from __future__ import annotations

from operator import getitem
from types import BuiltinFunctionType, FunctionType

from torch import fx

from flashnorm_compile.passes.batch_axis.call import bind_arguments, nodes_in

# From here on its two arguments share a storage, which schemas cannot say.
REPLACES_STORAGE = "aten.set_."


class Writes:
    """Which storages were overwritten with something that is not constant, and by whom."""

    def __init__(self) -> None:
        self._writer: dict[fx.Node, fx.Node] = {}

    def note(self, node: fx.Node) -> None:
        """Record what a call overwrites."""
        for target in _written(node):
            self._writer[_aliases(target)[-1]] = node

    def is_stale(self, node: fx.Node) -> bool:
        """Tell whether a node's storage was overwritten since the node was computed."""
        if not self._writer:
            return False
        aliases = _aliases(node)
        writer = self._writer.get(aliases[-1])
        return writer is not None and writer not in aliases


def _written(node: fx.Node) -> list[fx.Node]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        # A higher-order op may run a kernel that writes to any of its arguments.
        pure = isinstance(node.target, (BuiltinFunctionType, FunctionType, type))
        return [] if pure else list(node.all_input_nodes)
    if not schema.is_mutable:
        return []
    if str(node.target).startswith(REPLACES_STORAGE):
        return list(node.all_input_nodes)
    arguments = bind_arguments(node)
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return [n for name in written for n in nodes_in(arguments[name])]


def _aliases(node: fx.Node) -> list[fx.Node]:
    """Return a node and the nodes that it is a view of, up to the one that owns the storage."""
    chain = [node]
    while (base := _base(chain[-1])) is not None:
        chain.append(base)
    return chain


def _base(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is getitem:
        return node.args[0]
    schema = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return node.args[0] if is_view else None
