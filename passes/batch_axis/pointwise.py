"""Elementwise ops: entry by entry, with broadcasting."""

from __future__ import annotations

from flashnorm_compile.passes.batch_axis.call import Call, several, tensor_arguments
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.values import Constant, Value

# Beside the ops that torch itself tags as pointwise.
_UNTAGGED = (
    "aten.where.self",
    "aten.where.ScalarSelf",
    "aten.where.ScalarOther",
    "aten.where.Scalar",
    "aten.masked_fill",
    "aten._to_copy",
    "aten.to",
    "aten.alias",
    "aten.alias_copy",
    "aten.detach",
    "aten.detach_copy",
    "aten.lift_fresh_copy",
    "aten.lift_fresh",
    "aten.contiguous",
    "aten._conj",
    "aten._conj_copy",
    "aten._neg_view",
    "aten.resolve_conj",
    "aten.resolve_neg",
    "aten.real",
    "aten.imag",
    "aten.complex",
    "aten.polar",
    "aten.softplus_backward",
    "aten.elu_backward",
    "aten.hardtanh_backward",
    "aten.leaky_relu_backward",
    "aten.hardswish",
    "aten.hardswish_backward",
    "aten.hardsigmoid_backward",
    "aten.hardshrink_backward",
    "aten.softshrink_backward",
    "aten.mish_backward",
    "aten.log_sigmoid",
    "aten.log_sigmoid_backward",
    "aten._prelu_kernel",
    "aten.mse_loss_backward",
    "aten.smooth_l1_loss_backward",
    "aten.huber_loss_backward",
    "aten.binary_cross_entropy_backward",
    "aten.bernoulli.default",
    "aten.bernoulli.Tensor",
    "aten.poisson",
    "aten.binomial",
    "aten.normal.Tensor_float",
    "aten.normal.float_Tensor",
    "aten.normal.Tensor_Tensor",
    "aten.tril",
    "aten.triu",
    "aten.isin.Tensor_Scalar",
    "prims.abs",
    "prims.acos",
    "prims.acosh",
    "prims.add",
    "prims.asin",
    "prims.asinh",
    "prims.atan",
    "prims.atan2",
    "prims.atanh",
    "prims.bessel_i0",
    "prims.bessel_i0e",
    "prims.bessel_i1",
    "prims.bessel_i1e",
    "prims.bessel_j0",
    "prims.bessel_j1",
    "prims.bitwise_and",
    "prims.bitwise_or",
    "prims.bitwise_xor",
    "prims.cbrt",
    "prims.ceil",
    "prims.clone",
    "prims.conj",
    "prims.cos",
    "prims.cosh",
    "prims.device_put",
    "prims.div",
    "prims.eq",
    "prims.erf",
    "prims.erf_inv",
    "prims.erfc",
    "prims.erfcx",
    "prims.exp",
    "prims.expm1",
    "prims.floor",
    "prims.fma",
    "prims.fmod",
    "prims.gcd",
    "prims.ge",
    "prims.gt",
    "prims.imag",
    "prims.inductor_force_stride_order",
    "prims.isfinite",
    "prims.le",
    "prims.lgamma",
    "prims.log",
    "prims.log10",
    "prims.log1p",
    "prims.lt",
    "prims.mul",
    "prims.ndtri",
    "prims.ne",
    "prims.neg",
    "prims.pow",
    "prims.real",
    "prims.remainder",
    "prims.round",
    "prims.shift_left",
    "prims.shift_right_arithmetic",
    "prims.sin",
    "prims.sinh",
    "prims.spherical_bessel_j0",
    "prims.sqrt",
    "prims.sub",
    "prims.tan",
    "prims.tanh",
    "prims.view_of",
    "prims.where",
    "prims.zeta",
)


@rule("<pointwise>", *_UNTAGGED, batched=None)
def pointwise(call: Call) -> Value:
    """Every tensor argument broadcasts against the output."""
    tensors = tensor_arguments(call)
    return call.broadcast(tensors, len(call.out_shape))


@rule(
    "aten.frexp",
    "aten.log_sigmoid_forward",
    "aten._prelu_kernel_backward",
    "aten.rrelu_with_noise_functional",
    "prims.frexp",
    batched=None,
)
def pointwise_several(call: Call) -> Value:
    """Elementwise with several outputs; one may be an empty buffer (log_sigmoid's on CUDA)."""
    return several(call, call.broadcast(tensor_arguments(call), call.outputs[0].dim()))


@rule(
    "aten.mse_loss",
    "aten.l1_loss",
    "aten.smooth_l1_loss",
    "aten.huber_loss",
    "aten.binary_cross_entropy",
    "aten.binary_cross_entropy_with_logits",
    "aten.soft_margin_loss",
    batched=None,
)
def elementwise_loss(call: Call) -> Value:
    """Elementwise where it does not reduce (reduction 0)."""
    if call["reduction"] != 0:
        return call.mixed("reduces the loss over the batch")
    return pointwise(call)


@rule("aten.native_dropout", "aten._fused_dropout")
def native_dropout(call: Call) -> Value:
    """Return the output and a fresh random mask."""
    return call.x, Constant()


@rule("aten.copy", "aten.copy_", ignores=("self",), batched=("src",))
def copy(call: Call) -> Value:
    """Ignore the old content."""
    return call.aligned(call["src"], len(call.out_shape))
