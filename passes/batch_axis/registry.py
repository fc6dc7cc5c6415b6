"""The table of rules: one small function per op, registered by the op's name.

Keys are names ("aten.sum" for all overloads, "aten.max.dim" for one), not op objects: some
ops are absent from some torch versions, or exist only once Inductor is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashnorm_compile.passes.batch_axis.call import Call
from flashnorm_compile.passes.batch_axis.values import Value

Rule = Callable[[Call], Value]


@dataclass(frozen=True)
class Entry:
    """A rule and what it asks of the arguments.

    Attributes:
        rule: Called when no argument is mixed and at least one of ``batched`` has a batch axis.
        ignores: Arguments of which only shape and dtype matter.
        batched: Arguments that may have a batch axis; None for any. A batch axis elsewhere
            makes the result mixed without asking the rule.
    """

    rule: Rule
    ignores: frozenset[str] = frozenset()
    batched: frozenset[str] | None = None


ENTRIES: dict[str, Entry] = {}

FIRST = frozenset({"<first>"})


def rule(
    *names: str, ignores: tuple[str, ...] = (), batched: tuple[str, ...] | None = ("<first>",)
) -> Callable[[Rule], Rule]:
    """Register a rule for ops; by default only their first argument may have a batch axis."""

    def register(function: Rule) -> Rule:
        allowed = None if batched is None else frozenset(batched)
        for name in names:
            assert name not in ENTRIES, f"two batch-axis rules for {name}"
            ENTRIES[name] = Entry(function, frozenset(ignores), allowed)
        return function

    return register


def op_name(target: Any) -> str:
    """Return the name of an op or function as printed in graphs: "aten.sum.default"."""
    if hasattr(target, "_schema"):
        return str(target)
    return str(getattr(target, "__name__", target))


def find(target: Any) -> Entry | None:
    """Return the rule of an op: of its overload, else of all its overloads, else by its tag."""
    if not hasattr(target, "_schema"):
        return None
    name = op_name(target)
    entry = ENTRIES.get(name) or ENTRIES.get(name.rpartition(".")[0])
    if entry is not None:
        return entry
    return ENTRIES["<pointwise>"] if is_tagged_pointwise(target) else None


# Tagged pointwise by torch, yet not elementwise: `equal` compares whole tensors.
_NOT_ELEMENTWISE = frozenset({"aten.equal", "prims.frexp", "aten.frexp"})


def is_tagged_pointwise(target: Any) -> bool:
    """Tell whether torch's own ops (not a library's, which may be tagged at will) say so."""
    import torch

    namespace = op_name(target).partition(".")[0]
    return (
        namespace in ("aten", "prims")
        and op_name(target).rpartition(".")[0] not in _NOT_ELEMENTWISE
        and torch.Tag.pointwise in target.tags
    )
