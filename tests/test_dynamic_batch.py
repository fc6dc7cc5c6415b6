"""Batch sizes that change: one compilation where the axis is symbolic, right at every size."""

from __future__ import annotations

import pytest
import torch
from driver import bound_that_clips_some, call, clip, private_step, read_result, run_oracle
from oracle import assert_matches_oracle
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from zoo_modules import all_cases

from flashnorm_compile import _torch
from flashnorm_compile._torch import size_expr

CASES = all_cases()

#: Unlike any width or length of the cases. From 17 samples on torch itself compiles convolutions
#: on CPU anew.
SIZES = (13, 10)

#: One per kind of site, layout of the batch axis, and way from a site to its parameter.
DYNAMIC = (
    # matmul
    "dense-mlp",
    "dense-mlp_five_dims",
    "dense-time_first",
    "dense-batch_last",
    "dense-einsum_heads",
    "dense-mixer_time_matrix",
    "dense-hypernetwork_bmm",
    "attention-learned_queries",
    "dense-bilinear_time_axis",
    # reduction
    "dense-layer_norm_two_dims",
    "attention-class_token_repeat",
    "parameters-only_a_scalar",
    "parameters-scale_leading_one",
    # convolution
    "conv-conv2d_strided_dilated_grouped",
    "conv-conv_transpose1d_strided",
    "conv-cnn_max_pool",
    # embedding
    "sharing-embedding_padding_idx",
    "attention-positions_from_data",
    "attention-positions_expanded",
    # any other operation, once per sample
    "sharing-indexed_columns",
    "sharing-indexed_by_gather",
    # cross terms
    "sharing-tied_head",
    "sharing-embedding_twice_and_tied_head",
    "sharing-weight_at_three_lengths",
    "sharing-weight_and_its_transpose_time",
    # from the sites to the parameter
    "sharing-disjoint_slices",
    "sharing-overlapping_slices",
    "sharing-weight_through_softmax_and_raw",
    "dense-matmul_spellings",
    "attention-multihead_attention_cross",
    "attention-positions_parameter",
    "attention-relative_position_bias",
    "parameters-scalar_parameter",
    "parameters-channels_last_weight",
    "parameters-orthogonal_matrix_exp",
    "parameters-orthogonal_cayley",
    "parameters-weight_norm",
    "parameters-weight_norm_conv",
    "parameters-parameter_by_gather",
    "parameters-symmetric_weight",
    "losses-l2_regulariser",
    # normalisers that count tokens
    "losses-token_mean",
    "losses-masked_token_mean",
    "losses-two_token_means",
    "losses-class_weights_mean",
    "losses-mean_over_mean_of_mask",
)


#: Operations that the rewrite writes with a symbolic number of samples.
DYNAMIC_WITH_INDUCTOR = (
    "dense-matmul_spellings",
    "sharing-embedding_twice_and_tied_head",
    "sharing-indexed_by_gather",
    "losses-two_token_means",
)


@pytest.mark.parametrize("name", DYNAMIC)
def test_compiles_once_for_all_batch_sizes(name):
    check_sizes(CASES[name], lowering="eager")


@pytest.mark.inductor
@pytest.mark.parametrize("name", DYNAMIC_WITH_INDUCTOR)
def test_compiles_once_for_all_batch_sizes_with_inductor(name):
    check_sizes(CASES[name], lowering="inductor")


@pytest.mark.parametrize("name", [
    "dense-mlp_four_dims", "dense-time_first", "conv-conv2d_same_padding", "conv-cnn_max_pool",
    "sharing-tied_head", "attention-encoder_layer",
])
def test_compiles_once_with_all_axes_symbolic(name):
    """Height and width are one symbol where they agree: some sizes are quotients of others."""
    check_sizes(CASES[name], lowering="eager", dynamic=True)


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 1), (True, 1), (False, 3)])
def test_code_for_one_size_or_for_any(dynamic, graphs, monkeypatch):
    """The graphs are run as they are, which takes no time to compile."""
    monkeypatch.setattr(_torch, "compile_with_inductor", without_codegen)
    case = CASES["dense-mlp"]
    model = case.build_model()
    step = private_step(case.loss, lowering="inductor", dynamic=dynamic)
    for size in (13, 10, 7, 13, 10):
        batch = case.build_batch(size)
        model.zero_grad()
        actual = read_result(step, model, call(step, model, batch))
        expected = clip(run_oracle(case, batch), 1.0, case.loss_reduction)
        assert_matches_oracle(
            expected, norms=actual.norms, factors=actual.factors, grads=actual.grads
        )
    assert len(step.graphs) == graphs


def without_codegen(gm, inputs, joint_pass, settings):
    assert settings == {}
    return _torch.compile_without_codegen(gm, inputs, joint_pass)


def test_division_without_a_rest_is_written_as_one():
    shape_env = ShapeEnv()
    source = ConstantSource("size")
    size = shape_env.create_unspecified_symint_and_symbol(6, source, DimDynamic.DYNAMIC)
    assert size_expr(size * size // size) == size_expr(size)
    assert size_expr(6 * size // 3) == 2 * size_expr(size)
    for rounded in ((size + 1) // 2, size // 2, size * size // (size + 1), 12 // size):
        assert size_expr(rounded) == rounded.node.expr


def check_sizes(case, *, lowering: str, dynamic: bool | None = None) -> None:
    model = case.build_model()
    bound = bound_that_clips_some(run_oracle(case, case.build_batch(SIZES[0])).norms)
    step = private_step(
        case.loss,
        max_grad_norm=bound,
        lowering=lowering,
        dynamic=dynamic,
        loss_reduction=case.loss_reduction,
        in_dims=None if case.in_dims is None else {"kwargs": case.in_dims},
    )
    for size in SIZES:
        batch = case.build_batch(size)
        expected = clip(run_oracle(case, batch), bound, case.loss_reduction)
        if not dynamic:
            mark_batch_axis(batch, case.in_dims)
        model.zero_grad()
        actual = read_result(step, model, call(step, model, batch))
        assert_matches_oracle(
            expected,
            norms=actual.norms,
            factors=actual.factors,
            grads=actual.grads,
            precision=case.precision,
        )
    assert len(step.graphs) == 1


def mark_batch_axis(batch, in_dims) -> None:
    """Make Dynamo compile for any batch size, and raise if anything asks for this one."""
    if isinstance(batch, tuple):
        for tensor in batch:
            torch._dynamo.mark_dynamic(tensor, 0)
    else:
        for name, tensor in batch.items():
            torch._dynamo.mark_dynamic(tensor, in_dims[name])
