"""Operations of the graph as ``vmap`` maps them over samples.

Torch's own batching rules serve most operations. The ones here (2.11 to 2.13) ask for a concrete
number of samples, so that every batch size would be compiled anew; or have no rule, and vmap loops
over the samples; or write into a base that all samples share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


def run_mapped(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operation on one sample's values inside ``torch.func.vmap``, or on plain tensors."""
    # By name: Inductor registers some primitives when it is first imported.
    rule = _RULES.get(str(target))
    return target(*args, **kwargs) if rule is None else rule(target, *args, **kwargs)


class _SampleFirst(torch.autograd.Function):
    """``function(lead, *tensors)``, with ``lead`` 1 where all tensors have samples in front."""

    @staticmethod
    def forward(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        return function(0, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing: gradients are not differentiated again."""

    @staticmethod
    def vmap(
        _info: Any, in_dims: tuple[int | None, ...], function: Any, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        dims = in_dims[1:]
        size = next(x.shape[dim] for x, dim in zip(tensors, dims, strict=True) if dim is not None)
        in_front = [
            x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(tensors, dims, strict=True)
        ]
        return function(1, *in_front), 0


def own_base(base: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Give each sample a base of its own to write into.

    Under vmap a shared base would be expanded, and Inductor (2.11 to 2.13) turns a write into an
    expanded tensor into one in place, so that all samples land in one another's rows.
    """
    return values.new_zeros(base.shape) + base.to(values.dtype)


def _cat(target: Any, tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    dim %= tensors[0].ndim

    def code(lead: int, *parts: torch.Tensor) -> torch.Tensor:
        return target(list(parts), dim + lead)

    return _SampleFirst.apply(code, *tensors)


def _scatter(
    target: Any, base: torch.Tensor, values: torch.Tensor, dim: int = 0, *where: int
) -> torch.Tensor:
    """slice_scatter and select_scatter."""
    dim %= base.ndim

    def code(lead: int, base: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return target(own_base(base, values), values, dim + lead, *where)

    return _SampleFirst.apply(code, base, values)


def _scatter_add(
    target: Any, base: torch.Tensor, dim: int, index: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    dim %= base.ndim

    def code(
        lead: int, base: torch.Tensor, index: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        return target(own_base(base, values), dim + lead, index, values)

    return _SampleFirst.apply(code, base, index, values)


def _gather(target: Any, x: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    dim %= x.ndim

    def code(lead: int, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return target(x, dim + lead, index)

    return _SampleFirst.apply(code, x, index)


def _index_select(target: Any, x: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    dim %= x.ndim
    # All samples are indexed alike.
    return _SampleFirst.apply(lambda lead, x: target(x, dim + lead, index), x)


def _embedding_backward(
    target: Any, gradient: torch.Tensor, tokens: torch.Tensor, *options: Any
) -> torch.Tensor:
    def code(lead: int, gradient: torch.Tensor) -> torch.Tensor:
        if not lead:
            return target(gradient, tokens, *options)
        # All samples have the same tokens: a row of the table holds all of them.
        samples, width = gradient.shape[0], gradient.shape[-1]
        rows = target(gradient.movedim(0, -2).flatten(-2), tokens, *options)
        return rows.unflatten(1, (samples, width)).movedim(1, 0)

    return _SampleFirst.apply(code, gradient)


def _index_put(
    target: Any, base: torch.Tensor, indices: Any, values: torch.Tensor, *accumulate: bool
) -> torch.Tensor:
    return target(own_base(base, values), indices, values, *accumulate)


def _masked_index_put(
    _target: Any,
    base: torch.Tensor,
    mask: torch.Tensor,
    indices: list[torch.Tensor | None],
    values: torch.Tensor,
) -> torch.Tensor:
    """The masked accumulation, in operations that vmap knows."""
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    inside = [
        index if index is None else index.clamp(-size, size - 1)
        for index, size in zip(indices, base.shape, strict=False)
    ]
    return aten.index_put(own_base(base, values), inside, torch.where(mask, values, zero), True)


def _product(target: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    # One side is a sum that stayed float32, the other may be narrower.
    wide = torch.promote_types(left.dtype, right.dtype)
    return target(left.to(wide), right.to(wide))


def _fma(_target: Any, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return a * b + c


def _weight_norm_backward(
    _target: Any,
    gradient: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    norms: torch.Tensor,
    dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of v and g in w = g·v/‖v‖, with norms over all dims but ``dim``."""
    others = [d for d in range(v.ndim) if d != dim % v.ndim]
    along = (gradient * v).sum(others, keepdim=True)
    return g / norms * (gradient - v * along / norms.square()), along / norms


_RULES: dict[str, Callable[..., Any]] = {
    "aten.cat.default": _cat,
    "aten.slice_scatter.default": _scatter,
    "aten.select_scatter.default": _scatter,
    "aten.scatter_add.default": _scatter_add,
    "aten.gather.default": _gather,
    "aten.index_select.default": _index_select,
    "aten.embedding_dense_backward.default": _embedding_backward,
    "aten.index_put.default": _index_put,
    "aten._unsafe_masked_index_put_accumulate.default": _masked_index_put,
    "aten.mm.default": _product,
    "aten.bmm.default": _product,
    "aten.mv.default": _product,
    "prims.fma.default": _fma,
    "aten._weight_norm_interface_backward.default": _weight_norm_backward,
}
