"""Refuses samples that also reach a step as a constant: one memory under two names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from flashnorm_compile._torch import stored_tensors
from flashnorm_compile.errors import PrivacyError


def refuse_shared_memory(
    samples: Sequence[tuple[str, Any]], constants: Sequence[tuple[str, Any]]
) -> None:
    """Refuse samples and constants that overlap in memory, each given by name and tensor.

    Raises:
        PrivacyError: naming the two.
    """
    taken = [(name, *span) for name, value in samples for span in _spans(value)]
    if not taken:
        return
    for constant, value in constants:
        for start, end in _spans(value):
            for sample, first, last in taken:
                if start < last and first < end:
                    raise PrivacyError(
                        f"{sample} shares its memory with {constant}, which counts as the same "
                        f"for every sample: what {constant} brings into the loss would not be "
                        f"protected. If they are samples, keep them out of {constant}; if they "
                        f"are none, give {sample} the entry None in in_dims, or pass "
                        f"{sample}.clone()."
                    )


def checked_each_call(
    samples: Sequence[tuple[str, int]],
    constants: Sequence[tuple[str, int]],
    compiled: Callable[..., Any],
) -> Callable[..., Any]:
    """Call ``refuse_shared_memory`` on a graph's arguments before each call.

    Dynamo's guards see tensors that are one object, not those that share memory.

    Args:
        samples: names and positions of the batch inputs.
        constants: names and positions of the inputs that are free of samples.
        compiled: the graph.
    """

    def run(*args: Any) -> Any:
        refuse_shared_memory(
            [(name, args[index]) for name, index in samples],
            [(name, args[index]) for name, index in constants],
        )
        return compiled(*args)

    return run


# Nothing keeps samples deeper than this; objects refer to one another in circles.
_DEPTH = 6
_NO_BATCHES = (torch.nn.Module, torch.optim.Optimizer, type, ModuleType)


def leaves(
    value: Any, path: tuple[Any, ...] = (), *, arrays: bool = True
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Walk the tensors and arrays in dicts, lists, tuples and attributes: (path, tensor).

    An array's tensor is a new one, over the same memory.
    """
    if len(path) > _DEPTH:
        return
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if getattr(getattr(value, "dtype", None), "kind", "") in tuple("biufc"):
        if arrays:
            yield path, torch.as_tensor(value)
        return
    children: Any = ()
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    elif not callable(value) and not isinstance(value, _NO_BATCHES):
        children = getattr(value, "__dict__", {}).items()
    for key, child in children:
        yield from leaves(child, (*path, key), arrays=arrays)


def _spans(value: Any) -> Iterator[tuple[int, int]]:
    for tensor in stored_tensors(value):
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start and storage.nbytes():
            yield start, start + storage.nbytes()
