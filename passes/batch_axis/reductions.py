"""Ops that reduce dims, and ops that work along one."""

from __future__ import annotations

from typing import Any

from flashnorm_compile.passes.batch_axis.call import Call, several, tensor_arguments
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.values import Batched, Mixed, Value

# What the message says of an op, after the op's name.
_VERBS = {
    "sum": "sums",
    "mean": "averages",
    "amax": "takes the maximum",
    "max": "takes the maximum",
    "amin": "takes the minimum",
    "min": "takes the minimum",
    "var": "takes the variance",
    "var_mean": "takes the variance",
    "std": "takes the standard deviation",
}


def over_batch(call: Call) -> Mixed:
    """Return the verdict of a reduction over the batch axis."""
    name = str(call.node.target).split(".")[1]
    return call.mixed(f"{_VERBS.get(name, f'reduces ({name})')} over the batch axis")


def reduced(call: Call, dims: Any, keepdim: bool) -> Value:
    """Return the value of each output of a reduction of the first argument."""
    axis, gone = call.x, call.dims(dims)
    if axis.dim in gone:
        return over_batch(call)
    if not keepdim:
        axis = axis.at(axis.dim - sum(dim < axis.dim for dim in gone))
    return several(call, axis)


@rule(
    "aten.sum",
    "aten.mean",
    "aten.nansum",
    "aten.amax",
    "aten.amin",
    "aten.aminmax",
    "aten.argmax",
    "aten.argmin",
    "aten.any",
    "aten.all",
    "aten.prod",
    "aten.var",
    "aten.std",
    "aten.var_mean",
    "aten.std_mean",
    "aten.norm",
    "aten.linalg_vector_norm",
    "aten.logsumexp",
    "aten.special_logsumexp",
    "aten.count_nonzero",
    "aten.max.default",
    "aten.max.dim",
    "aten.min.default",
    "aten.min.dim",
    "aten.median",
    "aten.nanmedian",
    "aten.mode",
    "aten.kthvalue",
    "prims.sum",
    "prims.prod",
    "prims.amax",
    "prims.amin",
    "prims.var",
    "prims.xor_sum",
)
def reduce(call: Call) -> Value:
    """Reduce ``dim``, or all dims where it is absent, None or empty."""
    return reduced(call, call.get("dim", "dims"), bool(call.get("keepdim")))


@rule("prims.prepare_softmax_online")
def online_softmax(call: Call) -> Value:
    """Return the maximum and the sum of exponentials, both with the dim kept."""
    return reduced(call, [call["dim"]], keepdim=True)


@rule(
    "aten.cumsum",
    "aten.cumprod",
    "aten.logcumsumexp",
    "aten.cummax",
    "aten.cummin",
    "aten.sort",
    "aten.argsort",
    "aten.msort",
    "aten.topk",
    "aten._softmax",
    "aten._log_softmax",
    "aten._safe_softmax",
    "aten._softmax_backward_data",
    "aten._log_softmax_backward_data",
    "aten.glu",
    "aten.glu_backward",
    batched=None,
)
def along(call: Call) -> Value:
    """Work along one dim; the others do not meet. All tensors have the same dims."""
    axis = call.broadcast(tensor_arguments(call), call.ndim)
    dim = call.get("dim")
    if isinstance(axis, Batched) and axis.dim == call.dim(0 if dim is None else dim):
        return call.mixed(f"works along the batch axis ({str(call.node.target).split('.')[1]})")
    return several(call, axis)
