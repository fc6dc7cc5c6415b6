"""The backend's gradient is the oracle's, for every module of the zoo and every strategy."""

from __future__ import annotations

import pytest
from driver import call, check_case, check_every_strategy, private_step
from zoo_modules import all_cases

CASES = all_cases()
#: How samples' norms are found does not depend on what the loss makes of the model's output.
ABOUT_THE_LOSS = [
    name for name in CASES if name.startswith("losses-") and "regulariser" not in name
]
#: "auto" chooses another strategy for an embedding than for most other sites of its weight.
TIED_TO_EMBEDDINGS = [name for name in CASES if "tied" in name]

#: One case per kind of gradient site, and those whose lowering differs most.
WITH_INDUCTOR = (
    "dense-time_first",
    "dense-bilinear_time_axis",
    "conv-cnn_max_pool",
    "sharing-weight_at_three_lengths",
    "attention-class_token_expand",
    "parameters-scalar_parameter",
    "parameters-channels_last_weight",
    "losses-token_mean",
    "calls-autocast_tied_head",
)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ABOUT_THE_LOSS])
def test_matches_oracle(name):
    check_every_strategy(CASES[name])


@pytest.mark.parametrize("name", ABOUT_THE_LOSS)
def test_matches_oracle_with_any_loss(name):
    check_case(CASES[name], "ghost")


@pytest.mark.parametrize("name", TIED_TO_EMBEDDINGS)
def test_matches_oracle_with_a_strategy_for_each_site(name):
    check_case(CASES[name], "auto")


@pytest.mark.inductor
@pytest.mark.parametrize("name", WITH_INDUCTOR)
def test_matches_oracle_with_inductor(name):
    check_case(CASES[name], "auto", lowering="inductor")


def test_one_site_of_a_tied_weight_is_materialized_and_the_other_not():
    case = CASES["sharing-tied_head_of_prompt"]
    step = private_step(case.loss)
    call(step, case.build_model(), case.build_batch())
    row = next(row for row in step.plan.rows if row.parameter == "model.embedding.weight")
    assert dict(zip(row.sites, row.choices, strict=True)) == {
        "matmul": "materialize", "embedding": "ghost"
    }
