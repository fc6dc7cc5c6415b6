"""Ops that read only the shape and dtype of an argument: what they return is constant."""

from __future__ import annotations

from flashnorm_compile.passes.batch_axis.call import Call
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.values import Value

# Fills, fresh random numbers (independent of every sample) and shape queries.
_SELF_ONLY_FOR_SHAPE = (
    "aten.full_like",
    "aten.zeros_like",
    "aten.ones_like",
    "aten.empty_like",
    "aten.new_zeros",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
    "aten.new_empty_strided",
    "aten.rand_like",
    "aten.randn_like",
    "aten.randint_like",
    "aten.bernoulli.p",
    "aten.exponential",
    "aten.uniform",
    "aten.normal_functional",
    "aten.log_normal",
    "aten.geometric",
    "aten.cauchy",
    "aten.random",
    "aten.zero",
    "aten.fill.Scalar",
    "aten.sym_size",
    "aten.sym_numel",
    "aten.sym_stride",
    "aten.sym_storage_offset",
    "aten.sym_is_contiguous",
    "aten._assert_tensor_metadata",
    "prims.full_like",
)


@rule(*_SELF_ONLY_FOR_SHAPE, ignores=("self", "a"))
def shape_only(call: Call) -> Value:
    """Reached only if the shape itself depends on data."""
    return call.mixed("its shape depends on the data")


@rule("aten.fill.Tensor", ignores=("self",), batched=())
def fill(call: Call) -> Value:
    """Refuse: the filling value is a 0-d tensor, which has no batch axis."""
    return call.mixed("fills with a value that depends on the samples")
