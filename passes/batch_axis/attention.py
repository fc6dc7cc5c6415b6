"""Fused attention: rows of dim 0 do not meet."""

from __future__ import annotations

from typing import Any

from flashnorm_compile._torch import shape_exprs
from flashnorm_compile.passes.batch_axis.call import Call, shape_of
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.sizes import product, same
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Mixed, Value

NOT_ROWS = "no batch-axis rule for an attention whose batch axis is not dim 0"
PACKED = "no batch-axis rule for attention over packed sequences"

# Outputs that count, seed or measure lengths.
_CONSTANT_OUTPUTS = frozenset(
    {
        "cum_seq_q",
        "cum_seq_k",
        "max_q",
        "max_k",
        "max_seqlen_batch_q",
        "max_seqlen_batch_k",
        "rng_state",
        "unused",
        "philox_seed",
        "philox_offset",
    }
)
_PACKED_ARGUMENTS = ("cum_seq_q", "cum_seq_k", "cu_seqlens_q", "cu_seqlens_k", "block_table")
_ROWS = ("query", "key", "value", "attn_bias", "attn_mask", "bias", "out", "logsumexp")
_FORWARD = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)


@rule(
    *(f"aten.{name}" for name in _FORWARD),
    *(f"aten.{name}_backward" for name in _FORWARD),
    "aten._efficient_attention_forward",
    "aten._efficient_attention_backward",
    "aten._flash_attention_forward",
    "aten._flash_attention_backward",
    "aten._cudnn_attention_forward",
    "aten._cudnn_attention_backward",
    batched=(*_ROWS, "grad_out", "grad_out_"),
)
def attention(call: Call) -> Value:
    """Attend within each row of [rows, ...]; a mask has rows, or is constant."""
    if any(_is_tensor(call.get(name)) for name in _PACKED_ARGUMENTS):
        return call.mixed(PACKED)
    nodes = [node for name in (*_ROWS, "grad_out", "grad_out_") if (node := call.get(name))]
    axis = call.join(call.value(node) for node in nodes)
    if not isinstance(axis, Batched):
        return axis
    if axis.dim != 0 or not _has_rows(call, nodes):
        return call.mixed(NOT_ROWS)
    rows = shape_of(call["query"])[0]
    found = tuple(_output(call, i, out, axis, rows) for i, out in enumerate(call.outputs))
    return found if isinstance(call.node.meta["val"], (list, tuple)) else found[0]


def _is_tensor(argument: Any) -> bool:
    # An output that a kernel leaves undefined comes as a node without a value.
    return argument is not None and argument.meta.get("val") is not None


def _has_rows(call: Call, nodes: list[Any]) -> bool:
    """Tell whether all that have a batch axis have the rows of the query as dim 0."""
    rows = shape_of(call["query"])[0]
    if any(call[name].meta["val"].dim() != 4 for name in ("query", "key", "value")):
        return False
    logsumexp = call.get("logsumexp")
    return all(
        (node is logsumexp or node.meta["val"].dim() == 4) and same(shape_of(node)[0], rows)
        for node in nodes
        if isinstance(call.value(node), Batched)
    )


def _output(call: Call, position: int, out: Any, axis: Batched, rows: Any) -> Value:
    name = call.node.target._schema.returns[position].name
    if name in _CONSTANT_OUTPUTS or not hasattr(out, "shape"):
        return Constant()
    shape = shape_exprs(out.shape)
    if product(shape) == 0:
        return Constant()
    if shape and same(shape[0], rows):
        return axis
    # The gradient of a bias that all rows share.
    return Mixed(call.node, "sums over the batch axis")
