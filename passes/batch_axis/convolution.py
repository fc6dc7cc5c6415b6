"""Convolutions: rows of dim 0 do not meet, but in the gradients of weight and bias."""

from __future__ import annotations

from flashnorm_compile.passes.batch_axis.call import Call
from flashnorm_compile.passes.batch_axis.contractions import CONTRACTS
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Mixed, Value

NOT_ROWS = "no batch-axis rule for a convolution whose batch axis is not dim 0"


@rule("aten.convolution", "aten._convolution", "aten.convolution_overrideable")
def convolution(call: Call) -> Value:
    """[rows, channels, ...] with constant weights."""
    unbatched = call.ndim != call["weight"].meta["val"].dim()
    return call.mixed(NOT_ROWS) if unbatched or call.x.dim != 0 else call.x


@rule(
    "aten.convolution_backward",
    "aten.convolution_backward_overrideable",
    batched=("grad_output", "input"),
)
def convolution_backward(call: Call) -> Value:
    """Gradients of the input (rows do not meet), the weight and the bias (they do)."""
    gradient, data = call.value(call["grad_output"]), call.value(call["input"])
    axis = call.join([gradient, data])
    if not isinstance(axis, Batched):
        return axis
    if axis.dim != 0 or call.ndim != call["weight"].meta["val"].dim():
        return call.mixed(NOT_ROWS)
    contracted = call.mixed(CONTRACTS)
    found: tuple[Value, Value, Value] = (
        gradient,
        contracted,
        contracted if isinstance(gradient, Batched) else Constant(),
    )
    return masked(found, call["output_mask"])


def masked(
    values: tuple[Value, ...], mask: list[bool]
) -> tuple[Constant | Batched | Mixed | tuple, ...]:
    """Replace the outputs that are not computed by constants."""
    return tuple(value if on else Constant() for value, on in zip(values, mask, strict=True))
