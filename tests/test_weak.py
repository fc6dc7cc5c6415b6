"""A dict that knows tensors by identity, and lets them go."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from flashnorm_compile.weak import WeakTensorDict


def test_equal_tensors_are_different_keys():
    first, second = torch.zeros(3), torch.zeros(3)
    found = WeakTensorDict()
    found[first], found[second] = "first", "second"
    assert (found[first], found.get(second), len(found)) == ("first", "second", 2)
    assert first in found
    assert torch.zeros(3) not in found
    assert found.get(torch.zeros(3)) is None
    with pytest.raises(KeyError):
        found[torch.zeros(3)]


def test_a_value_is_replaced_where_it_stands():
    tensors = [torch.zeros(3) for _ in range(3)]
    found = WeakTensorDict()
    for position, tensor in enumerate(tensors):
        found[tensor] = position
    found[tensors[0]] = 7
    assert [value for _, value in found.items()] == [7, 1, 2]
    assert all(map(lambda key, tensor: key is tensor, found, tensors))
    assert found.pop(tensors[1]) == 1
    assert [value for _, value in found.items()] == [7, 2]
    found.clear()
    assert not found


def test_entries_go_with_their_tensors():
    tensor, found = torch.zeros(3), WeakTensorDict()
    found[tensor] = "value"
    alive = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert alive() is None
    assert (len(found), found._entries) == (0, {})


def test_a_tensor_with_the_id_of_one_that_is_gone_has_no_entry():
    """Entries may outlive their tensors for a moment, while these are being collected."""
    gone, other = torch.zeros(3), torch.zeros(3)
    found = WeakTensorDict()
    found[gone] = "value"
    found._entries[id(other)] = found._entries.pop(id(gone))
    assert other not in found
    assert found.get(other) is None
    found[other] = "another"
    assert found[other] == "another"
    # When the first one's entry is to be forgotten, this one stays.
    del gone
    gc.collect()
    assert found[other] == "another"


def test_a_dict_goes_with_its_values_at_once():
    tensor, value, found = torch.zeros(3), torch.zeros(3), WeakTensorDict()
    found[tensor] = value
    alive = weakref.ref(value)
    gc.disable()
    try:
        del found, value
        assert alive() is None
    finally:
        gc.enable()


def test_copies_have_the_same_tensors_and_entries_of_their_own():
    tensor, found = torch.zeros(3), WeakTensorDict()
    found[tensor] = ["value"]
    shallow, deep = copy.copy(found), copy.deepcopy(found)
    assert shallow[tensor] is found[tensor]
    assert deep[tensor] == found[tensor]
    assert deep[tensor] is not found[tensor]
    del found[tensor]
    assert (tensor in shallow, tensor in deep) == (True, True)


def test_a_tensor_that_only_cpp_holds_is_handed_back():
    """The graph keeps the tensor; its Python object is the one that was the key."""
    found = WeakTensorDict()
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    found[x] = "value"
    place = id(x)
    del x
    gc.collect()
    ((again, value),) = found.items()
    assert (id(again), value) == (place, "value")
    y.sum().backward()
    assert torch.equal(again.grad, torch.full((3,), 2.0))
