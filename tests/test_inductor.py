"""What the rewrite writes into a graph is the same after code generation, operation by operation.

Inductor lowers writes into tensors and views of them by its own rules; ``lowering="eager"`` runs
none of them.
"""

from __future__ import annotations

import pytest
from driver import call, check_case, clip, gradients_of, private_step, run_oracle
from oracle import assert_matches_oracle
from zoo_modules import all_cases

CASES = all_cases()
pytestmark = pytest.mark.inductor

SITES = [
    # index_put, scatter_add and slice_scatter, into a table of each sample's own
    ("sharing-embedding_padding_idx", "materialize"),
    ("sharing-indexed_columns", "auto"),
    ("sharing-indexed_by_two_indices", "auto"),
    ("parameters-parameter_by_indexing", "materialize"),
    ("parameters-parameter_by_gather", "auto"),
    ("attention-positions_parameter", "auto"),
    # rows of equal tokens, and cross terms with output heads
    ("sharing-embedding_repeated_tokens", "ghost"),
    ("sharing-tied_head_padding_idx", "ghost"),
    ("sharing-weight_and_its_transpose_time", "ghost"),
    # patches (as_strided)
    ("conv-conv2d_strided_dilated_grouped", "materialize"),
    ("conv-conv_transpose1d_grouped_dilated", "ghost"),
    # bmm
    ("dense-einsum_heads", "materialize"),
    # samples' own normalisers
    ("losses-masked_token_mean", "auto"),
    # float32 sums in a bfloat16 model
    ("calls-bfloat16_tied_head", "auto"),
]


@pytest.mark.parametrize(("name", "strategy"), SITES)
def test_matches_oracle(name, strategy):
    check_case(CASES[name], strategy, lowering="inductor")


def test_accumulation_matches_oracle():
    case = CASES["sharing-tied_head"]
    batch, model = case.build_batch(5), case.build_model()
    expected = clip(run_oracle(case, batch), 1.0, "mean")
    step = private_step(case.loss, lowering="inductor")
    with step.accumulate():
        for rows in (slice(0, 3), slice(3, 5)):
            call(step, model, tuple(part[rows] for part in batch))
    assert_matches_oracle(
        expected,
        norms=step.per_sample_norms,
        factors=step.clipping_factors,
        grads=gradients_of(model),
    )
