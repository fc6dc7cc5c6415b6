"""Refuses what a step keeps of its samples where the rewrite does not see it again.

A value put on a module, or into a container that outlives the step, carries data out without
noise. It also comes back as what it is not: a fresh batch of samples, after a graph break.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from flashnorm_compile import _torch
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.roles import Role, Roles, may_hold_samples, user_name


def refuse_kept_samples(gm: fx.GraphModule, roles: Roles) -> None:
    """Refuse to keep what depends on samples in a frame that trains.

    A detached scalar, such as a loss for the log, may be kept outside of modules: it cannot be
    taken for a batch, and the step may as well return it.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    samples = [placeholders[each.index] for each in roles.inputs if each.role is Role.BATCH]
    _refuse_kept(gm, samples, on_modules_only=False)


def refuse_changes(gm: fx.GraphModule, frame: _torch.Frame, in_dims: Any) -> None:
    """Refuse what a frame that trains nothing does to the samples of a step around it.

    What follows its graph break would take them for the samples that the step was called with.
    """
    if isinstance(frame.values.get("self"), torch.optim.Optimizer):
        return
    samples = [
        node
        for node in gm.graph.find_nodes(op="placeholder")
        if may_hold_samples(node, frame, in_dims)
    ]
    end = frame.end
    goes_on = end is not None and (end.is_backward or end.is_optimizer)
    if goes_on or any(broke.is_backward for broke in frame.earlier_breaks):
        _refuse_kept(gm, samples, on_modules_only=not goes_on)
    if end is None or not goes_on or not samples:
        return
    for node in _torch.changed_inputs(gm):
        if node in samples:
            source = _torch.input_source(node)
            name = node.name if source is None else user_name(source)
            raise PrivacyError(
                f"{frame.name} changes {name} before the graph break at {end.location}: "
                f"what follows would take it for the samples that {frame.name} was called with. "
                "Do that work after the break and on a copy, or outside the compiled function."
            )


def _refuse_kept(gm: fx.GraphModule, samples: Iterable[fx.Node], *, on_modules_only: bool) -> None:
    tainted = set(samples)
    for node in gm.graph.nodes:
        if any(arg in tainted for arg in node.all_input_nodes):
            tainted.add(node)
    for kept in _torch.kept_tensors(gm):
        node, on_module = kept.node, kept.owner.in_module
        if not on_module and (on_modules_only or node is None):
            continue
        if node is not None and (node not in tainted or (not on_module and _is_scalar(node))):
            continue
        location = "" if node is None else _torch.source_location(node)
        remedy = "." if on_module else ", use a variable of the step, or keep a detached scalar."
        raise PrivacyError(
            f"The step keeps a value that depends on samples in {user_name(kept.owner)}{kept.key}; "
            f"it would carry data out without noise, or come back as a batch of samples"
            f"{location and f' ({location})'}. Return it from the step instead{remedy}"
        )


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta["example_value"]
    return not isinstance(value, torch.Tensor) or (value.ndim == 0 and not value.requires_grad)
