"""Matrix products, as Einstein sums over named dims."""

from __future__ import annotations

from typing import Any

from flashnorm_compile.passes.batch_axis.call import Call
from flashnorm_compile.passes.batch_axis.registry import rule
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Mixed, Value

CONTRACTS = "contracts the batch axis"
COMPARES = "compares every sample with every other"


def einsum(call: Call, operands: list[tuple[Any, str]], out: str) -> Constant | Batched | Mixed:
    """Return the value of a product.

    Args:
        call: The call.
        operands: Each operand with a letter per dim.
        out: A letter per dim of the output; letters not in it are summed over.
    """
    dims = out + "".join(dict.fromkeys(c for _, letters in operands for c in letters))
    placed: list[Constant | Batched | Mixed] = []
    for node, letters in operands:
        value = call.value(node)
        if isinstance(value, Batched):
            value = value.at(dims.index(letters[value.dim]))
        placed.append(value)
    found = {value.dim for value in placed if isinstance(value, Batched)}
    contracted = any(dim >= len(out) for dim in found)
    if len(found) > 1:
        return call.mixed(CONTRACTS if contracted else COMPARES)
    # Operands whose merged dims lie in different orders do not join, contracted or not.
    axis = call.join(placed)
    if contracted and isinstance(axis, Batched):
        return call.mixed(CONTRACTS)
    return axis


@rule("aten.mm", "aten._int_mm", batched=None)
def mm(call: Call) -> Value:
    """[n, k] x [k, m]."""
    return einsum(call, [(call["self"], "nk"), (call["mat2"], "km")], "nm")


@rule("aten.bmm", batched=None)
def bmm(call: Call) -> Value:
    """[b, n, k] x [b, k, m]."""
    return einsum(call, [(call["self"], "bnk"), (call["mat2"], "bkm")], "bnm")


@rule("aten.mv", batched=None)
def mv(call: Call) -> Value:
    """[n, k] x [k]."""
    return einsum(call, [(call["self"], "nk"), (call["vec"], "k")], "n")


@rule("aten.dot", "aten.vdot", batched=None)
def dot(call: Call) -> Value:
    """[k] x [k]."""
    return call.mixed(CONTRACTS)


@rule("aten.ger", "aten.outer", batched=None)
def outer(call: Call) -> Value:
    """[n] x [m]."""
    return einsum(call, [(call["self"], "n"), (call["vec2"], "m")], "nm")


def _plus_bias(call: Call, product: Constant | Batched | Mixed, bias: Any, ndim: int) -> Value:
    if bias is None:
        return product
    return call.join([product, call.aligned(bias, ndim)])


@rule("aten.addmm", batched=None)
def addmm(call: Call) -> Value:
    """Multiply and add: a bias, broadcast, plus [n, k] x [k, m]."""
    product = einsum(call, [(call["mat1"], "nk"), (call["mat2"], "km")], "nm")
    return _plus_bias(call, product, call["self"], 2)


@rule("aten.baddbmm", batched=None)
def baddbmm(call: Call) -> Value:
    """Multiply and add: a bias, broadcast, plus [b, n, k] x [b, k, m]."""
    product = einsum(call, [(call["batch1"], "bnk"), (call["batch2"], "bkm")], "bnm")
    return _plus_bias(call, product, call["self"], 3)


@rule("aten.addmv", batched=None)
def addmv(call: Call) -> Value:
    """Multiply and add: a bias plus [n, k] x [k]."""
    product = einsum(call, [(call["mat"], "nk"), (call["vec"], "k")], "n")
    return _plus_bias(call, product, call["self"], 1)


@rule("aten.linear", batched=None)
def linear(call: Call) -> Value:
    """[..., k] x [m, k], plus a bias [m]."""
    lead = "abcdefgh"[: call.ndim - 1]
    weight = "mk"[-call["weight"].meta["val"].dim() :]
    out = lead + weight[:-1]
    product = einsum(call, [(call["input"], lead + "k"), (call["weight"], weight)], out)
    return _plus_bias(call, product, call["bias"], len(out))


@rule("aten.matmul", batched=None)
def matmul(call: Call) -> Value:
    """[..., n, k] x [..., k, m] with broadcast leading dims; vectors have no n or no m."""
    left, right = call["self"], call["other"]
    left_ndim, right_ndim = left.meta["val"].dim(), right.meta["val"].dim()
    lead = "abcdefgh"[: max(left_ndim, right_ndim, 2) - 2]
    left_letters = (lead + "nk")[-left_ndim:] if left_ndim > 1 else "k"
    right_letters = (lead + "km")[-right_ndim:] if right_ndim > 1 else "k"
    out = lead + ("n" if left_ndim > 1 else "") + ("m" if right_ndim > 1 else "")
    return einsum(call, [(left, left_letters), (right, right_letters)], out)


@rule("aten._cdist_forward", batched=None)
def cdist(call: Call) -> Value:
    """Distances of [..., n, k] and [..., m, k], with broadcast leading dims."""
    left, right = call["x1"], call["x2"]
    lead = "abcdefgh"[: len(call.out_shape) - 2]
    operands = [
        (left, (lead + "nk")[-left.meta["val"].dim() :]),
        (right, (lead + "mk")[-right.meta["val"].dim() :]),
    ]
    return einsum(call, operands, lead + "nm")


@rule("aten._scaled_mm", batched=("self", "mat2", "scale_a", "scale_b"))
def scaled_mm(call: Call) -> Value:
    """[n, k] x [k, m] with scales per tensor, per row [n, 1] or per column [1, m]."""
    product = einsum(call, [(call["self"], "nk"), (call["mat2"], "km")], "nm")
    row, column = call.value(call["scale_a"]), call.value(call["scale_b"])
    if isinstance(row, Batched) and (row.dim != 0 or call["scale_a"].meta["val"].dim() != 2):
        return call.mixed("no batch-axis rule for these scales")
    if isinstance(column, Batched) and (column.dim != 1 or call["scale_b"].meta["val"].dim() != 2):
        return call.mixed("no batch-axis rule for these scales")
    return call.join([product, row, column])
