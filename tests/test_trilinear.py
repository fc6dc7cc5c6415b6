"""Bilinear layers as matrix products: torch's own operation, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbation import batched, check, k

from flashnorm_compile.passes.batch_axis import Constant
from flashnorm_compile.passes.trilinear import trilinear

NDIM = 4
SIZES = (3, 2, 5, 4)
OPERATION = torch.ops.aten._trilinear.default


@st.composite
def dims_of_factors(draw):
    """Give each dim of the product to some of the factors; sum over some, as autograd does."""
    factors = st.sets(st.integers(0, 2), min_size=1)
    owners = [draw(factors) for _ in range(NDIM)]
    expands = [[dim for dim in range(NDIM) if i not in owners[dim]] for i in range(3)]
    return expands, sorted(draw(st.sets(st.integers(0, NDIM - 1))))


@settings(max_examples=100, deadline=None)
@given(dims=dims_of_factors())
def test_is_torchs_operation(dims):
    expands, sums = dims
    factors = [
        torch.randn([size for dim, size in enumerate(SIZES) if dim not in expand])
        for expand in expands
    ]
    expected = OPERATION(*factors, *expands, sums)
    torch.testing.assert_close(trilinear(*factors, *expands, sums), expected)


def test_dims_counted_from_the_end():
    factors = torch.randn(3, 5), torch.randn(2, 5, 4), torch.randn(3, 4)
    expected = trilinear(*factors, [1, 3], [0], [1, 2], [2, 3])
    assert torch.equal(trilinear(*factors, [-3, -1], [-4], [-3, -2], [-2, -1]), expected)


#: What each factor of the layer's operation and of its gradients lacks, and what is summed over.
LAYER = ([1, 3], [0], [1, 2], [2, 3])
GRADIENT_OF_FIRST = ([2, 3], [0], [1, 2], [1, 3])
GRADIENT_OF_WEIGHT = ([1, 3], [2, 3], [1, 2], [0])
# As many samples as each of the other dims: sizes must not matter.
FIRST, SECOND, INCOMING = (sample.clone() for sample in k(3, 3, 3))
WEIGHT = k(3, 3, 3)
B0, K = batched(0), Constant()
CONTRACTS = "contracts the batch axis"


@pytest.mark.parametrize(("factors", "dims", "seeds", "expected"), [
    ((FIRST, WEIGHT, SECOND), LAYER, (B0, K, B0), B0),
    ((FIRST, WEIGHT, SECOND), LAYER, (B0, K, K), B0),
    ((FIRST, WEIGHT, SECOND), LAYER, (B0, K, batched(1)), CONTRACTS),
    ((INCOMING, WEIGHT, SECOND), GRADIENT_OF_FIRST, (B0, K, B0), B0),
    ((FIRST, INCOMING, SECOND), GRADIENT_OF_WEIGHT, (B0, B0, B0), CONTRACTS),
])
def test_samples_meet_in_the_gradient_of_the_weight_alone(factors, dims, seeds, expected):
    assert check(lambda *x: trilinear(*x, *dims), factors, seeds) == expected
