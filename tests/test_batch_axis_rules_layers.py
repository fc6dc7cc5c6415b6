"""Rules of layers: convolution, pooling, norms, losses, each against an experiment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from perturbation import at, batched, case, check, check_op, ints, k, x

from flashnorm_compile.passes.batch_axis import Constant

aten = torch.ops.aten
prims = torch.ops.prims

K, B0, B1 = Constant(), batched(0), batched(1)
CONTRACTS = "contracts the batch axis"


image = x(3, 3, 6, 6)
weight = k(4, 3, 3, 3)
conv_args = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

WINDOWS = [
    case(aten.convolution.default, image, weight, k(4), *conv_args, to=B0),
    case(
        aten.convolution.default,
        x(3, 3, 6, 6, dim=1),
        weight,
        None,
        *conv_args,
        to="no batch-axis rule",
    ),
    case(
        aten.convolution.default,
        k(3, 3, 6, 6),
        x(3, 3, 3, 3),
        None,
        *conv_args,
        to="no batch-axis rule",
    ),
    case(
        aten.convolution_backward.default,
        x(3, 4, 6, 6),
        image,
        weight,
        [4],
        *conv_args,
        [True, True, True],
        to=(B0, CONTRACTS, CONTRACTS),
    ),
    case(
        aten.convolution_backward.default,
        x(3, 4, 6, 6),
        image,
        weight,
        [4],
        *conv_args,
        [True, False, False],
        to=(B0, K, K),
    ),
    case(
        aten.convolution_backward.default,
        k(3, 4, 6, 6),
        image,
        weight,
        [4],
        *conv_args,
        [True, True, True],
        to=(K, CONTRACTS, K),
    ),
    case(aten.max_pool2d_with_indices.default, image, [2, 2], to=(B0, B0)),
    case(aten.max_pool2d_with_indices.default, x(2, 3, 4, 4, dim=1), [2, 2], to=(B1, B1)),
    case(aten.avg_pool2d.default, image, [2, 2], to=B0),
    case(aten.avg_pool2d.default, x(2, 3, 4, dim=1), [2, 2], to="takes windows"),
    case(
        aten.avg_pool2d_backward.default,
        x(3, 3, 3, 3),
        image,
        [2, 2],
        [2, 2],
        [0, 0],
        False,
        True,
        None,
        to=B0,
    ),
    case(aten._adaptive_avg_pool2d.default, image, [1, 1], to=B0),
    case(aten._adaptive_avg_pool2d_backward.default, x(3, 3, 1, 1), image, to=B0),
    case(aten.adaptive_max_pool2d.default, image, [2, 2], to=(B0, B0)),
    case(
        prims._low_memory_max_pool_with_offsets.default,
        image,
        [2, 2],
        [2, 2],
        [0, 0],
        [1, 1],
        False,
        to=(B0, B0),
    ),
    case(aten.upsample_nearest2d.default, image, [9, 9], to=B0),
    case(aten.upsample_bilinear2d.default, image, [9, 9], False, to=B0),
    case(aten.upsample_linear1d.default, x(3, 3, 4), [9], False, to=B0),
    case(aten.upsample_bicubic2d_backward.default, image, [6, 6], [3, 3, 3, 3], False, to=B0),
    case(aten.grid_sampler_2d.default, image, at(k(3, 2, 2, 2).tanh(), 0), 0, 0, False, to=B0),
    case(aten.grid_sampler_2d.default, image, k(3, 2, 2, 2).tanh(), 0, 0, False, to=B0),
    case(
        aten.grid_sampler_2d_backward.default,
        x(3, 3, 2, 2),
        image,
        at(k(3, 2, 2, 2).tanh(), 0),
        0,
        0,
        False,
        [True, True],
        to=(B0, B0),
    ),
    case(aten.im2col.default, image, [2, 2], [1, 1], [0, 0], [2, 2], to=B0),
    case(aten.col2im.default, x(3, 12, 9), [6, 6], [2, 2], [1, 1], [0, 0], [2, 2], to=B0),
    case(aten.pixel_shuffle.default, x(3, 4, 3, 3), 2, to=B0),
    case(aten.native_channel_shuffle.default, x(3, 4, 3, 3), 2, to=B0),
]

rows = x(3, 2, 4)
squares = x(3, 4, 4)
BATCH_NORM = "batch norm takes statistics over the batch"

NORMS = [
    case(aten.native_layer_norm.default, rows, [4], k(4), k(4), 1e-5, to=(B0, B0, B0)),
    case(
        aten.native_layer_norm.default,
        x(2, 3, 4, dim=1),
        [3, 4],
        None,
        None,
        1e-5,
        to="normalises over the batch axis",
    ),
    case(
        aten.native_layer_norm_backward.default,
        rows,
        rows,
        [4],
        x(3, 2, 1),
        x(3, 2, 1),
        k(4),
        k(4),
        [True, True, False],
        to=(B0, CONTRACTS, K),
    ),
    case(aten.native_group_norm.default, x(3, 4, 5), k(4), k(4), 3, 4, 5, 2, 1e-5, to=(B0, B0, B0)),
    case(
        aten.native_group_norm.default,
        x(4, 3, 5, dim=1),
        None,
        None,
        4,
        3,
        5,
        1,
        1e-5,
        to="normalises over the batch axis",
    ),
    case(
        aten.native_group_norm_backward.default,
        x(3, 4, 5),
        x(3, 4, 5),
        x(3, 2),
        x(3, 2),
        k(4),
        3,
        4,
        5,
        2,
        [True, True, True],
        to=(B0, CONTRACTS, CONTRACTS),
    ),
    case(
        aten.native_batch_norm.default,
        x(3, 4, 5),
        None,
        None,
        None,
        None,
        True,
        0.1,
        1e-5,
        to=BATCH_NORM,
    ),
    case(
        aten.native_batch_norm.default,
        x(1, 6, 5, dim=1, inner=2),
        k(6),
        None,
        None,
        None,
        True,
        0.1,
        1e-5,
        to=(batched(1, inner=2), batched(0, inner=2), batched(0, inner=2)),
    ),
    case(
        aten._native_batch_norm_legit_no_training.default,
        x(3, 4, 5),
        None,
        None,
        k(4),
        k(4).abs(),
        0.1,
        1e-5,
        to=(B0, K, K),
    ),
    case(
        aten._native_batch_norm_legit_functional.default,
        x(3, 4, 5),
        None,
        None,
        k(4),
        k(4).abs(),
        True,
        0.1,
        1e-5,
        to=BATCH_NORM,
    ),
    case(
        aten.native_batch_norm_backward.default,
        x(3, 4, 5),
        x(3, 4, 5),
        k(4),
        k(4),
        k(4).abs(),
        None,
        None,
        False,
        1e-5,
        [True, True, True],
        to=(B0, CONTRACTS, CONTRACTS),
    ),
    case(aten.nll_loss_forward.default, x(3, 4), at(ints(3), 0), None, 0, -100, to=(B0, K)),
    case(
        aten.nll_loss_forward.default,
        x(3, 4),
        at(ints(3), 0),
        None,
        1,
        -100,
        to="reduces the loss over the batch",
    ),
    case(
        aten.nll_loss_backward.default,
        k(),
        x(3, 4),
        at(ints(3), 0),
        None,
        1,
        -100,
        k().abs(),
        to=B0,
    ),
    case(aten.linalg_inv_ex.default, squares, to=(B0, B0)),
    case(aten.linalg_inv_ex.default, x(3, 3), to="takes samples for the rows"),
    case(aten._linalg_det.default, squares, to=(B0, B0, B0)),
    case(aten._linalg_solve_ex.default, squares, x(3, 4, 2), to=(B0,) * 4),
    case(aten.linalg_solve_triangular.default, k(3, 4, 4), x(3, 4, 2), upper=True, to=B0),
    case(aten.linalg_qr.default, squares, to=(B0, B0)),
    case(aten._fft_r2c.default, rows, [2], 0, True, to=B0),
    case(aten._fft_r2c.default, rows, [0], 0, True, to="transforms along the batch axis"),
]

volume = x(3, 2, 4, 4, 4)
positive = at(torch.eye(4, dtype=torch.float64) + 0.1 * k(3, 1, 1).abs().expand(3, 4, 4), 0)

OTHER_NAMES = [
    case(aten._fused_rms_norm.default, rows, [4], k(4), 1e-5, to=(B0, B0)),
    case(
        aten._native_batch_norm_legit.no_stats,
        *(x(1, 6, 5, dim=1, inner=2), None, None, True, 0.1, 1e-5),
        to=(batched(1, inner=2), batched(0, inner=2), batched(0, inner=2)),
    ),
    case(
        aten._batch_norm_with_update_functional.default,
        *(x(1, 6, 5, dim=1, inner=2), k(6), k(6), k(6), k(6).abs(), 0.1, 1e-5),
        to=BATCH_NORM,
    ),
    case(
        aten.nll_loss2d_forward.default,
        *(x(3, 3, 2, 2), at(ints(3, 2, 2), 0), None, 0, -100),
        to=(B0, K),
    ),
    case(aten.avg_pool3d.default, volume, [2, 2, 2], to=B0),
    case(aten.max_pool3d_with_indices.default, volume, [2, 2, 2], to=(B0, B0)),
    case(aten.upsample_nearest3d.default, volume, [8, 8, 8], to=B0),
    case(aten.upsample_nearest1d_backward.default, x(3, 2, 8), [8], [3, 2, 4], to=B0),
    case(aten._upsample_bilinear2d_aa.default, image, [4, 4], False, to=B0),
    case(
        aten.max_pool2d_with_indices_backward.default,
        *(x(3, 3, 3, 3), image, [2, 2], [2, 2], [0, 0], [1, 1], False),
        at(ints(3, 3, 3, 3, high=36), 0),
        to=B0,
    ),
    case(aten.max_unpool2d.default, x(3, 3, 3, 3), at(ints(3, 3, 3, 3), 0), [6, 6], to=B0),
    case(aten.pixel_unshuffle.default, image, 2, to=B0),
    case(aten.channel_shuffle.default, x(3, 4, 3, 3), 2, to=B0),
    case(aten._convolution.default, image, weight, None, *conv_args, *[False] * 4, to=B0),
    case(aten.linalg_cholesky_ex.default, positive, to=(B0, B0)),
    case(aten._linalg_eigh.default, positive, to=(B0, B0)),
    case(aten._linalg_svd.default, squares, to=(B0, B0, B0)),
    case(aten._linalg_slogdet.default, squares, to=(B0, B0, B0, B0)),
    case(aten.linalg_lu_factor_ex.default, squares, to=(B0, B0, B0)),
    case(aten.linalg_matrix_exp.default, squares, to=B0),
    case(aten.triangular_solve.default, x(3, 4, 2), squares, to=(B0, B0)),
    case(aten.cholesky_solve.default, x(3, 4, 2), k(4, 4), to="no batch-axis rule for matrices"),
    case(prims.fft_r2c.default, rows, dim=[2], onesided=True, to=B0),
]


@pytest.mark.parametrize(("op", "args", "kwargs", "expected"), [*WINDOWS, *NORMS, *OTHER_NAMES])
def test_rule(op: Any, args: tuple, kwargs: dict, expected: Any) -> None:
    found = check_op(op, *args, **kwargs)
    if isinstance(expected, str):
        assert isinstance(found, str), found
        assert found.startswith(expected)
    else:
        assert found == expected


@pytest.mark.parametrize("decompose", [True, False])
def test_functions_that_decompose(decompose: bool) -> None:
    def several(t: torch.Tensor, target: torch.Tensor) -> Any:
        return (
            F.interpolate(t, scale_factor=2.0, mode="bilinear"),
            F.max_pool2d(t, 2),
            F.adaptive_avg_pool2d(t, 3),
            F.pad(t, (1, 1, 1, 1), mode="reflect"),
            F.instance_norm(t),
            F.pixel_shuffle(torch.cat([t, t[:, :1]], 1), 2),
            F.unfold(t, 2),
            F.cross_entropy(t.mean((2, 3)), target, reduction="none"),
            torch.fft.fft2(t).real,
            torch.einsum("bchw,bcij->bhwij", t, t),
        )

    found = check(several, (k(3, 3, 6, 6), ints(3)), (B0, B0), decompose=decompose)
    assert found == (B0,) * 10
