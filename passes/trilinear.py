"""Bilinear layers: one operation of torch's, written as two matrix products.

``aten._trilinear`` is all there is to a bilinear layer, forward and backward. As products, its
gradients are ordinary sites. A decomposition handed to Inductor would do the same, but Inductor
does not cache what it compiles with foreign decompositions.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch
from torch import fx

from flashnorm_compile.passes.emit import Emitter


def replace_trilinear(graph: fx.Graph) -> bool:
    """Replace every ``_trilinear`` in a graph; return whether there was one."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.aten._trilinear.default)
    if nodes:
        emit = Emitter(graph)
        for node in nodes:
            emit.replace(node, trilinear)
    return bool(nodes)


def trilinear(
    i1: torch.Tensor,
    i2: torch.Tensor,
    i3: torch.Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> torch.Tensor:
    """Σ i1·i2·i3 over ``sumdim``, each factor broadcast along the dims it lacks, its ``expand``.

    Dims are counted in the product before it is summed. ``unroll_dim``, along which torch's own
    implementation loops, is of no consequence here.
    """
    ndim = i1.dim() + len(expand1)
    letters = string.ascii_lowercase[:ndim]

    def without(dims: Sequence[int]) -> str:
        dropped = {dim % ndim for dim in dims}
        return "".join(letter for dim, letter in enumerate(letters) if dim not in dropped)

    first, second, third = without(expand1), without(expand2), without(expand3)
    out = without(sumdim)
    pair = "".join(x for x in letters if x in first + second and x in third + out)
    product = torch.einsum(f"{first},{second}->{pair}", i1, i2)
    return torch.einsum(f"{pair},{third}->{out}", product, i3)
