"""A dict with tensors for keys, by identity, that does not keep them alive."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any, TypeVar

import torch

V = TypeVar("V")


_MISSING = object()


class _Key(weakref.ref[torch.Tensor]):
    """A weak reference that knows where its tensor's entry is once the tensor is gone."""

    __slots__ = ("place",)
    place: int


class WeakTensorDict(MutableMapping[torch.Tensor, V]):
    """Values for tensors as long as they live; entries keep the order they came in.

    A step looks up each parameter several times. ``torch.utils.weak.WeakIdKeyDictionary`` makes an
    object for each look-up, which adds up to milliseconds.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[_Key, V]] = {}
        # Keys hold this, and must not hold the dict.
        this = weakref.ref(self)

        def forget(key: weakref.ref[torch.Tensor]) -> None:
            assert isinstance(key, _Key)
            found = this()
            if found is not None:
                entry = found._entries.get(key.place)
                if entry is not None and entry[0] is key:
                    del found._entries[key.place]

        self._forget = forget

    def get(self, tensor: torch.Tensor, default: Any = None) -> Any:
        """Return a tensor's value, or the default."""
        entry = self._entries.get(id(tensor))
        # Another tensor may have the id of one that is gone. The reference then holds nothing.
        return entry[1] if entry is not None and entry[0]() is tensor else default

    def __getitem__(self, tensor: torch.Tensor) -> V:
        value = self.get(tensor, _MISSING)
        if value is _MISSING:
            raise KeyError(id(tensor))
        return value

    def __contains__(self, tensor: object) -> bool:
        entry = self._entries.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def __setitem__(self, tensor: torch.Tensor, value: V) -> None:
        place = id(tensor)
        entry = self._entries.get(place)
        if entry is not None and entry[0]() is tensor:
            self._entries[place] = entry[0], value
            return
        # Not in the place of an older one.
        self._entries.pop(place, None)
        key = _Key(tensor, self._forget)
        key.place = place
        self._entries[place] = key, value

    def __delitem__(self, tensor: torch.Tensor) -> None:
        self[tensor]
        del self._entries[id(tensor)]

    def items(self) -> list[tuple[torch.Tensor, V]]:  # type: ignore[override]
        """Return the tensors that are alive, with their values."""
        found = []
        for key, value in list(self._entries.values()):
            tensor = key()
            if tensor is not None:
                # Only C++ may hold it: then Python has to take it over, see torch.utils.weak.
                tensor._fix_weakref()  # type: ignore[attr-defined]
                found.append((tensor, value))
        return found

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (tensor for tensor, _ in self.items())

    def __len__(self) -> int:
        return len(self.items())

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()

    def __copy__(self) -> WeakTensorDict[V]:
        copied: WeakTensorDict[V] = WeakTensorDict()
        copied.update(self.items())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakTensorDict[V]:
        """Copy the values; the keys are the same tensors."""
        copied: WeakTensorDict[V] = WeakTensorDict()
        copied.update((tensor, copy.deepcopy(value, memo)) for tensor, value in self.items())
        return copied
