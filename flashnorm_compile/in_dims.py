"""The option ``in_dims``: where the user says that an input's batch axis is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from flashnorm_compile._torch import Frame, InputSource, mark_size
from flashnorm_compile.errors import PrivacyError


def dims_by_name(in_dims: Any, frame: Frame) -> Any:
    """Turn in_dims given by position into a mapping from argument name to spec."""
    if in_dims is None:
        return 0
    if isinstance(in_dims, (tuple, list)):
        if len(in_dims) > len(frame.positional):
            raise PrivacyError(
                f"in_dims has {len(in_dims)} entries, but {frame.name} takes "
                f"{len(frame.positional)} positional arguments: {', '.join(frame.positional)}."
            )
        return dict(zip(frame.positional, in_dims, strict=False))
    return in_dims


def expect_batches(arguments: Any) -> None:
    """Let Dynamo's first trace see symbols for the sizes of batches that lie in dim 0.

    Only to save time: what is not found here has Dynamo trace again, once its graph is seen.
    """
    for value in pytree.tree_leaves(arguments):
        if not isinstance(value, torch.Tensor) or value.requires_grad or value.is_nested:
            continue
        if value.ndim > 0 and value.shape[0] > 1:
            mark_size(value, 0)


def refuse_unknown_names(named: Any, roots: Iterable[str | None], frame: Frame) -> None:
    """Refuse names that are neither arguments nor roots of inputs: they may be misspelt."""
    if not isinstance(named, Mapping):
        return
    known = {*frame.arguments, *roots}
    unknown = [name for name in named if name not in known]
    if unknown:
        raise PrivacyError(
            f"in_dims names {', '.join(map(repr, unknown))}, but {frame.name} has no such "
            f"argument; it has {', '.join(frame.arguments)}."
        )


def follow(spec: Any, path: tuple[Any, ...], name: str) -> int | None:
    """Follow a path into nested in_dims; an int or None covers all that lies below it."""
    for key in path:
        if spec is None or isinstance(spec, int):
            break
        if isinstance(spec, Mapping):
            spec = spec.get(key, 0)
        elif isinstance(spec, (tuple, list)) and isinstance(key, int) and key < len(spec):
            spec = spec[key]
        else:
            raise PrivacyError(f"in_dims does not say where the batch axis of {name} is: {spec!r}.")
    if spec is None or (isinstance(spec, int) and not isinstance(spec, bool)):
        return spec
    raise PrivacyError(
        f"in_dims gives {spec!r} for {name}, which is a tensor; it takes an int or None."
    )


def names_attribute(named: Any, source: InputSource) -> bool:
    """Return whether in_dims speaks of an attribute itself, not only of the module it is in."""
    assert source.module_depth is not None
    spec = named
    for key in (source.root, *source.path[: source.module_depth + 1]):
        if not isinstance(spec, Mapping) or key not in spec:
            return False
        spec = spec[key]
    return True


def declaration(source: InputSource) -> str:
    """Write the in_dims that declares this one input, and nothing beside it, a constant."""
    spec: Any = None
    for key in reversed((source.root, *source.path)):
        spec = {key: spec}
    return f"in_dims={spec!r}"
