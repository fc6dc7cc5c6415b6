"""Normalisation layers that were not decomposed."""

from __future__ import annotations

from flashnorm_compile.passes.batch_axis.call import Call, is_empty, several
from flashnorm_compile.passes.batch_axis.contractions import CONTRACTS
from flashnorm_compile.passes.batch_axis.convolution import masked
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Mixed, Value

BATCH_NORM = "batch norm takes statistics over the batch"
NORMALISES = "normalises over the batch axis"


@rule("aten.native_layer_norm", "aten._fused_rms_norm")
def layer_norm(call: Call) -> Value:
    """Normalise the last dims; statistics keep the others."""
    first_normalised = call.ndim - len(call["normalized_shape"])
    if call.x.dim >= first_normalised:
        return call.mixed(NORMALISES)
    return several(call, call.x)


@rule(
    "aten.native_layer_norm_backward",
    "aten._fused_rms_norm_backward",
    batched=("grad_out", "input", "mean", "rstd"),
)
def layer_norm_backward(call: Call) -> Value:
    """Gradients of the input (rows do not meet) and of scale and shift (they do)."""
    names = [name for name in ("grad_out", "input", "mean", "rstd") if name in call.args]
    axis = call.broadcast([call[name] for name in names], call.ndim)
    if isinstance(axis, Batched) and axis.dim >= call.ndim - len(call["normalized_shape"]):
        return call.mixed(NORMALISES)
    return _input_gradient(call, axis)


@rule("aten.native_group_norm")
def group_norm(call: Call) -> Value:
    """Normalise groups of channels of each row."""
    return call.mixed(NORMALISES) if call.x.dim != 0 else several(call, call.x)


@rule(
    "aten.native_group_norm_backward",
    batched=("grad_out", "input", "mean", "rstd"),
)
def group_norm_backward(call: Call) -> Value:
    """Gradients of the input (rows do not meet) and of scale and shift (they do)."""
    axis = call.join(call.value(call[name]) for name in ("grad_out", "input", "mean", "rstd"))
    if isinstance(axis, Batched) and axis.dim != 0:
        return call.mixed(NORMALISES)
    return _input_gradient(call, axis)


def _input_gradient(call: Call, axis: Constant | Batched | Mixed) -> Value:
    if isinstance(axis, Mixed):
        return axis
    mask = call["output_mask"]
    return masked((axis, *[call.mixed(CONTRACTS)] * (len(mask) - 1)), mask)


@rule(
    "aten.native_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_functional",
    "aten._native_batch_norm_legit_no_training",
    "aten._batch_norm_with_update",
    "aten._batch_norm_with_update_functional",
    "aten._batch_norm_no_update",
    "aten.cudnn_batch_norm",
)
def batch_norm(call: Call) -> Value:
    """Normalise each channel (dim 1) over all else, or by constants in evaluation.

    Instance norm is a batch norm of ``[1, B * channels, ...]``: samples do not meet there.
    """
    statistics = Batched(0, call.x.outer, call.x.inner)
    if not _trains(call):
        return (call.x, *[Constant()] * (len(call.outputs) - 1))
    # The fused kernels also return a buffer for their backward, in no known layout.
    fused = any(part in str(call.node.target) for part in ("with_update", "cudnn"))
    if call.x.dim != 1 or fused:
        return call.mixed(BATCH_NORM)
    rest = (Constant() if is_empty(out) else statistics for out in call.outputs[1:])
    return (call.x, *rest)


def _trains(call: Call) -> bool:
    name = str(call.node.target)
    if "no_training" in name or "no_update" in name:
        return False
    return "with_update" in name or bool(call["training"])


@rule("aten.native_batch_norm_backward", batched=("grad_out", "input"))
def batch_norm_backward(call: Call) -> Value:
    """Gradients of the input, scale and shift, in evaluation."""
    axis = call.join([call.value(call["grad_out"]), call.value(call["input"])])
    if call["train"] or not isinstance(axis, Batched) or axis.dim == 1:
        return call.mixed(BATCH_NORM)
    return _input_gradient(call, axis)
