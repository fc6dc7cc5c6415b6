"""Rules of fused attention and other fused ops, many of which exist on a GPU only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from perturbation import at, batched, case, check, check_op, k, verdict, x
from torch._subclasses import FakeTensorMode

from flashnorm_compile.passes.batch_axis import Constant

aten = torch.ops.aten

K, B0 = Constant(), batched(0)
CONTRACTS = "contracts the batch axis"

q = x(3, 2, 4, 8)
flash_cpu = aten._scaled_dot_product_flash_attention_for_cpu

ATTENTION = [
    case(flash_cpu.default, q, q, q, to=(B0, B0)),
    case(flash_cpu.default, q, k(3, 2, 5, 8), k(3, 2, 5, 8), to=(B0, B0)),
    case(flash_cpu.default, k(3, 2, 4, 8), q, k(3, 2, 4, 8), to=(B0, B0)),
    case(flash_cpu.default, q, q, q, attn_mask=k(4, 4), to=(B0, B0)),
    case(flash_cpu.default, q, q, q, attn_mask=x(3, 1, 4, 4), to=(B0, B0)),
    case(
        flash_cpu.default,
        x(2, 3, 4, 8, dim=1),
        *[x(2, 3, 4, 8, dim=1)] * 2,
        to="no batch-axis rule for an attention",
    ),
    case(
        flash_cpu.default,
        x(6, 2, 4, 8, inner=2),
        *[x(6, 2, 4, 8, inner=2)] * 2,
        to=(batched(0, inner=2),) * 2,
    ),
    case(
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        q,
        q,
        q,
        q,
        q,
        at(k(3, 4, 2).transpose(1, 2), 0),
        0.0,
        False,
        to=(B0, B0, B0),
    ),
]


@pytest.mark.parametrize(("op", "args", "kwargs", "expected"), ATTENTION)
def test_rule(op: Any, args: tuple, kwargs: dict, expected: Any) -> None:
    found = check_op(op, *args, **kwargs)
    if isinstance(expected, str):
        assert isinstance(found, str), found
        assert found.startswith(expected)
    else:
        assert found == expected


def cuda(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.float16)


def flash() -> Any:
    q = at(cuda(3, 2, 16, 32), 0)
    return verdict(aten._scaled_dot_product_flash_attention.default, q, q, q)


def flash_backward() -> Any:
    q, lse = at(cuda(3, 2, 16, 32), 0), at(cuda(3, 2, 16), 0)
    op, seed = aten._scaled_dot_product_flash_attention_backward.default, cuda(2)
    return verdict(op, q, q, q, q, q, lse, None, None, 16, 16, 0.0, False, seed, seed)


def efficient() -> Any:
    q, bias = at(cuda(3, 2, 16, 32), 0), at(cuda(3, 2, 16, 16), 0)
    return verdict(aten._scaled_dot_product_efficient_attention.default, q, q, q, bias, True)


def efficient_backward(bias_gradient: bool) -> Any:
    q, lse, seed = at(cuda(3, 2, 16, 32), 0), at(cuda(3, 2, 32), 0), cuda()
    op = aten._scaled_dot_product_efficient_attention_backward.default
    bias, wanted = cuda(3, 2, 16, 16), [True, True, True, bias_gradient]
    return verdict(op, q, q, q, q, bias, q, lse, seed, seed, 0.0, wanted)


def cudnn() -> Any:
    q = at(cuda(3, 2, 16, 32), 0)
    return verdict(aten._scaled_dot_product_cudnn_attention.default, q, q, q, None, True)


def packed() -> Any:
    q, ends = at(cuda(48, 2, 32), 0), torch.empty(4, device="cuda", dtype=torch.int32)
    op = aten._flash_attention_forward.default
    return verdict(op, q, q, q, ends, ends, 16, 16, 0.0, False, False)


def rms_norm_backward() -> Any:
    rows, op = at(cuda(3, 2, 4), 0), aten._fused_rms_norm_backward.default
    return verdict(op, rows, rows, [4], at(cuda(3, 2, 1), 0), cuda(4), [True, True])


def scaled_product(*scales: Any) -> Any:
    a = torch.empty(48, 32, dtype=torch.float8_e4m3fn)
    op = aten._scaled_mm.default
    return verdict(op, at(a, 0, inner=16), a[:16].t(), *scales, out_dtype=torch.bfloat16)


def scale(*shape: int) -> torch.Tensor:
    return torch.empty(shape)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (flash, (B0, B0, *[K] * 7)),
        (flash_backward, (B0, B0, B0)),
        (efficient, (B0, B0, K, K)),
        (lambda: efficient_backward(True), (B0, B0, B0, B0)),
        (lambda: efficient_backward(False), (B0, B0, B0, K)),
        (cudnn, (B0, B0, *[K] * 7)),
        (packed, "no batch-axis rule for attention over packed sequences"),
        (rms_norm_backward, (B0, CONTRACTS)),
        (lambda: scaled_product(scale(), scale()), batched(0, inner=16)),
        (
            lambda: scaled_product(at(scale(48, 1), 0, inner=16), scale(1, 16)),
            batched(0, inner=16),
        ),
    ],
)
def test_ops_of_a_gpu(call: Callable[[], Any], expected: Any) -> None:
    """By their shapes: fake tensors need no device."""
    with FakeTensorMode():
        assert call() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", torch.nn.attention.SDPBackend.__members__.values())
def test_attention_on_a_gpu_against_an_experiment(backend: Any, monkeypatch: Any) -> None:
    def attend(q: torch.Tensor) -> Any:
        q = q.detach().requires_grad_()
        out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return out, torch.autograd.grad(out.square().sum(), q)[0]

    q = k(3, 2, 16, 32).to("cuda", torch.float16)
    # What a kernel leaves unwritten (the seeds of no dropout) must be equal in both runs.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.nn.attention.sdpa_kernel(backend):
            attend(q)
            found = check(attend, (q,), (B0,))
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == (B0, B0)
