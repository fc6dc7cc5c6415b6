"""Rules of reads and writes by index, each against an experiment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from perturbation import At, at, batched, case, check, check_op, ints, k, mask, x

aten = torch.ops.aten

B0, B1, B2 = batched(0), batched(1), batched(2)
MEETS = "pairs different samples"
GATHERS = "gathers across samples"
PLACES = "meets constants by its position in the batch"
WRITES = "writes across samples"
ADDS = "accumulates over the batch axis"


def ix(*shape: int, high: int = 3, dim: int = 0) -> At:
    """Return random indices with a batch axis."""
    return at(ints(*shape, high=high), dim)


INDEXING = [
    # Constant tables, batched indices: neighbouring and separated index dims.
    case(aten.index.Tensor, k(3, 4), [ix(3, 3)], to=B0),
    case(aten.index.Tensor, k(4, 3), [None, ix(5, 3, dim=1)], to=B2),
    case(aten.index.Tensor, k(3, 3, 4), [ix(3, 1), ints(3)], to=B0),
    case(aten.index.Tensor, k(3, 5, 3), [ix(3), None, ints(3)], to=B0),
    case(aten.index.Tensor, k(5, 3, 3), [None, ix(3), ints(2, 3)], to=B2),
    case(aten.index.Tensor, k(3, 3), [ix(3, 1), ix(3)], to=MEETS),
    # Batched source.
    case(aten.index.Tensor, x(3, 3), [None, ints(4)], to=B0),
    case(aten.index.Tensor, x(5, 4, 3, dim=2), [ints(2, 2), ints(2, 2)], to=B2),
    case(aten.index.Tensor, x(5, 3, 4, dim=1), [ints(2), None, ints(2)], to=B1),
    case(aten.index.Tensor, x(3, 3), [ints(3)], to=GATHERS),
    case(aten.index.Tensor, x(3, 3), [ix(3)], to=GATHERS),
    case(aten.index.Tensor, x(3, 3), [None, ix(3)], to=MEETS),
    case(aten._unsafe_index.Tensor, x(3, 3), [None, ints(4)], to=B0),
    case(aten._unsafe_masked_index.default, x(3, 4), mask(3), [None, ints(3)], 0.0, to=B0),
    case(
        aten._unsafe_masked_index.default,
        k(5, 2),
        at(mask(3, 2), 0),
        [ix(3, 1, high=5), ints(2, high=2)],
        0.0,
        to=B0,
    ),
    # Writes.
    case(aten.index_put.default, k(5, 4), [ix(3)], x(3, 4), True, to=ADDS),
    case(aten.index_put.default, k(5, 4), [ix(3)], k(4), to=WRITES),
    case(aten.index_put.default, x(3, 4), [None, ints(2)], k(2), to=B0),
    case(aten.index_put.default, x(3, 4), [None, ints(2)], x(3, 2), True, to=B0),
    case(aten.index_put.default, k(3, 4), [None, ints(2)], x(3, 2), True, to=B0),
    case(aten.index_put.default, k(2, 3, 4), [ints(3), None, ints(3)], x(3, 3), True, to=ADDS),
    case(
        aten.index_put.default,
        k(2, 3, 4),
        [ints(3, high=2), None, ints(3)],
        x(3, 3, dim=1),
        True,
        to=B1,
    ),
    case(aten.index_put.default, x(3, 4), [ints(2)], k(4), to=B0),
    case(aten.index_put.default, x(3, 4), [ints(3)], x(3, 4), True, to=ADDS),
    case(
        aten._unsafe_masked_index_put_accumulate.default,
        k(5, 4),
        at(mask(3, 1), 0),
        [ix(3)],
        x(3, 4),
        to=ADDS,
    ),
    case(
        aten._unsafe_masked_index_put_accumulate.default,
        k(3, 5),
        mask(2),
        [None, ints(2)],
        x(3, 2),
        to=B0,
    ),
    case(aten.index_select.default, x(3, 3), 1, ints(4), to=B0),
    case(aten.index_select.default, x(3, 3), 0, ints(4), to=GATHERS),
    case(aten.index_select.default, k(3, 3), 1, ix(3), to=B1),
    case(aten.index_add.default, k(3, 3), 1, ints(2), x(3, 2), to=B0),
    case(aten.index_add.default, k(3, 3), 0, ints(3), x(3, 3), to=ADDS),
    case(aten.index_add.default, k(3, 3), 0, ix(3), k(3, 3), to="no batch-axis rule"),
    case(aten.index_copy.default, x(3, 3), 1, torch.tensor([0, 2]), x(3, 2), to=B0),
    case(aten.index_fill.int_Scalar, x(3, 3), 0, ints(2), 1.0, to=B0),
    case(aten.take.default, k(3, 3), ix(3, 2, high=9), to=B0),
    case(aten.embedding.default, k(5, 3), ix(3, 3), to=B0),
    case(aten.embedding.default, x(5, 3, dim=1), ints(2, 2), to=B2),
    case(aten.embedding.default, x(3, 4), ints(2), to=GATHERS),
    case(aten.embedding_dense_backward.default, x(3, 2, 4), ix(3, 2), 5, -1, False, to=ADDS),
    case(aten.gather.default, x(3, 3), 1, ix(3, 2), to=B0),
    case(aten.gather.default, x(3, 3), 1, ints(3, 2), to=B0),
    case(aten.gather.default, x(3, 3), 1, ints(2, 2), to="takes some of the samples"),
    case(aten.gather.default, x(3, 3), 0, ix(3, 3), to=GATHERS),
    case(aten.gather.default, k(3, 3), 0, ix(3, 3), to=B0),
    case(aten.gather.default, x(3, 3), 1, ix(3, 3, dim=1), to=MEETS),
    case(aten.scatter.src, k(3, 4), 1, ix(3, 1), x(3, 1), to=B0),
    case(aten.scatter.value, k(3, 4), 1, ix(3, 1), 1.0, to=B0),
    case(aten.scatter.value, k(5, 4), 1, ix(3, 1), 1.0, to=WRITES),
    case(aten.scatter.value, k(3, 4), 0, ix(3, 4), 1.0, to=WRITES),
    case(aten.scatter.value, x(3, 4), 0, ints(2, 4), 1.0, to=WRITES),
    case(aten.scatter.value, x(3, 4), 1, ints(3, 2), 1.0, to=B0),
    case(aten.scatter.value, x(3, 4), 1, ints(2, 2), 1.0, to=PLACES),
    case(aten.scatter_add.default, k(3, 4), 1, ix(3, 1), k(3, 1), to=B0),
    case(aten.scatter_add.default, k(3, 4), 1, ix(3, 1), k(5, 1), to=WRITES),
    case(aten.gather.default, k(3, 3), 1, ix(3, 2), to=B0),
    case(aten.gather.default, k(5, 3), 1, ix(3, 2), to=PLACES),
    case(aten.scatter_add.default, k(3, 3), 0, ix(3, 3), x(3, 3), to=ADDS),
    case(aten.scatter_add.default, k(3, 3), 0, ints(3, 3), x(3, 3, dim=1), to=B1),
    case(aten.scatter_add.default, k(3, 3), 0, ints(2, 3), x(3, 3), to=ADDS),
    case(aten.scatter_reduce.two, x(3, 3), 1, ix(3, 3), x(3, 3), "amax", to=B0),
    case(aten.masked_scatter.default, x(3, 3), mask(3, 3), k(9), to=B0),
    case(aten.masked_scatter.default, x(3, 3), mask(3, 3), x(3, 3), to="no batch-axis rule"),
    case(aten.masked_scatter.default, k(3, 3), at(mask(3, 3), 0), k(9), to="no batch-axis rule"),
    case(aten.bucketize.Tensor, x(3, 3), k(4).sort()[0], to=B0),
    case(aten.searchsorted.Tensor, k(3, 4).sort()[0], x(3, 3), to=B0),
    case(aten.searchsorted.Tensor, k(4).sort()[0], x(3, 3, dim=1), to=B1),
    case(aten.searchsorted.Tensor, x(3), k(3), to="searches across samples"),
    case(aten.one_hot.default, ix(3, 2), 3, to=B0),
    case(aten.multinomial.default, at(k(3, 4).abs(), 0), 2, to=B0),
]


@pytest.mark.parametrize(("op", "args", "kwargs", "expected"), INDEXING)
def test_rule(op: Any, args: tuple, kwargs: dict, expected: Any) -> None:
    found = check_op(op, *args, **kwargs)
    if isinstance(expected, str):
        assert isinstance(found, str), found
        assert found.startswith(expected)
    else:
        assert found == expected


samples = k(3, 4, 5)
picks = ints(3, high=4)


@pytest.mark.parametrize("decompose", [True, False])
@pytest.mark.parametrize("symbolic", [True, False])
class TestCountingTheSamples:
    """`arange(B)` as an index keeps every sample on its own slice."""

    def test_read(self, symbolic: bool, decompose: bool) -> None:
        def read(t: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
            return t[torch.arange(t.shape[0]), i]

        found = check(read, (samples, picks), (B0, B0), symbolic=symbolic, decompose=decompose)
        assert found == B0

    def test_read_of_several_per_sample(self, symbolic: bool, decompose: bool) -> None:
        def read(t: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
            return t[torch.arange(t.shape[0]).unsqueeze(1), i]

        inputs = (samples, ints(3, 7, high=4))
        found = check(read, inputs, (B0, B0), symbolic=symbolic, decompose=decompose)
        assert found == B0

    def test_read_along_a_later_dim(self, symbolic: bool, decompose: bool) -> None:
        def read(t: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
            return t[i, torch.arange(t.shape[1])[:, None].expand(-1, 1).reshape(-1)]

        inputs = (k(4, 3, 5), picks)
        found = check(read, inputs, (B1, B0), symbolic=symbolic, decompose=decompose)
        assert found == B0

    def test_write(self, symbolic: bool, decompose: bool) -> None:
        def write(i: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            zeros = torch.zeros(i.shape[0], 4, dtype=v.dtype)
            return torch.index_put(zeros, (torch.arange(i.shape[0]), i), v)

        found = check(write, (picks, k(3)), (B0, B0), symbolic=symbolic, decompose=decompose)
        assert found == B0

    def test_gradient_of_a_read(self, symbolic: bool, decompose: bool) -> None:
        def gradient(t: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
            t = t.detach().requires_grad_()
            loss = t[torch.arange(t.shape[0]), i].pow(2).sum()
            return torch.autograd.grad(loss, t)[0]

        found = check(gradient, (samples, picks), (B0, B0), symbolic=symbolic, decompose=decompose)
        assert found == B0

    def test_counting_backwards_gathers(self, symbolic: bool, decompose: bool) -> None:
        def read(t: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
            return t[t.shape[0] - 1 - torch.arange(t.shape[0]), i]

        found = check(read, (samples, picks), (B0, B0), symbolic=symbolic, decompose=decompose)
        assert found == GATHERS

    def test_write_to_other_rows(self, symbolic: bool, decompose: bool) -> None:
        def write(i: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            zeros = torch.zeros(i.shape[0], i.shape[0], dtype=v.dtype)
            return torch.index_put(zeros, (i, torch.arange(i.shape[0])), v)

        found = check(write, (ints(3), k(3)), (B0, B0), symbolic=symbolic, decompose=decompose)
        assert found == B1  # sample b writes to column b


def test_counting_one_dim_while_another_is_the_sample() -> None:
    """Positions count: the index runs over all rows, but not in step with the samples."""

    def read(t: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return t[torch.arange(3)[None, :], i]

    assert check(read, (k(3, 4), ints(3, 1, high=4)), (B0, B0)) == MEETS
