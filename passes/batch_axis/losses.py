"""Losses that were not decomposed."""

from __future__ import annotations

from flashnorm_compile.passes.batch_axis.call import Call
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Value

_NONE = 0
REDUCES = "reduces the loss over the batch"


@rule("aten.nll_loss_forward", "aten.nll_loss2d_forward", batched=("self", "target"))
def nll_loss(call: Call) -> Value:
    """[rows, classes, ...] and [rows, ...]; the total weight is only of a reduced loss."""
    axis = call.join([call.value(call["self"]), call.value(call["target"])])
    if not isinstance(axis, Batched):
        return axis
    if call["reduction"] != _NONE:
        return call.mixed(REDUCES)
    return (axis, Constant()) if _on_rows(call, axis) else call.mixed("pairs different samples")


@rule(
    "aten.nll_loss_backward",
    "aten.nll_loss2d_backward",
    ignores=("self",),
    batched=("grad_output", "target"),
)
def nll_loss_backward(call: Call) -> Value:
    """Return the gradient of [rows, classes, ...]."""
    axis = call.join([call.value(call["grad_output"]), call.value(call["target"])])
    if isinstance(axis, Batched) and not _on_rows(call, axis):
        return call.mixed("pairs different samples")
    return axis


def _on_rows(call: Call, axis: Batched) -> bool:
    # A single sample's [classes] has no rows.
    return axis.dim == 0 and call["self"].meta["val"].dim() > 1
