"""How operands [B, T, width] lie in memory, and whether kernels read them 16 bytes at once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from flashnorm_compile.kernels.division import round_up


@dataclass(frozen=True)
class Layout:
    """How a kernel reads an operand: T tokens of ``width`` places.

    Attributes:
        along: "places" or "tokens", whichever lie side by side: then the address and all other
            strides are multiples of 16 bytes. "any" promises nothing.
        strides: of samples, tokens and places.
    """

    along: str
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """A tensor [B, T, width], and how it is read."""

    tensor: Tensor
    layout: Layout


def describe_operand(x: Tensor, *, descriptors: bool) -> Operand:
    """Find the layout of [B, T, width], none of its sizes 0; see `find_layout`."""
    aligned = x.data_ptr() % 16 == 0
    return Operand(x, find_layout(x.shape, x.stride(), x.element_size(), aligned, descriptors))


# A step has many layers of one shape.
@functools.lru_cache(maxsize=4096)
def find_layout(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    element_size: int,
    aligned: bool,
    descriptors: bool,
) -> Layout:
    """Return how [B, T, width] is read.

    Args:
        shape: B, T and width, none of them 0.
        stride: of each.
        element_size: in bytes.
        aligned: whether the address is a multiple of 16 bytes.
        descriptors: whether a kernel reads by tensor descriptors what it can. Where it does not,
            the size of what lies side by side must be a multiple of 16 bytes, too.
    """
    (samples, tokens, width), (sample, token, place) = shape, stride
    vector = 16 // element_size
    for along, inner, outer, inner_size, outer_size in (
        ("places", place, token, width, tokens),
        ("tokens", token, place, tokens, width),
    ):
        # Strides of dims of size 1 mean nothing; they are replaced by some that serve.
        inner = 1 if inner_size == 1 else inner
        outer = round_up(inner_size, vector) if outer_size == 1 else outer
        each = outer * outer_size if samples == 1 else sample
        lengths = (outer, each) if descriptors else (outer, each, inner_size)
        # Nor does a descriptor take a stride of 0 (of an expanded tensor).
        if aligned and inner == 1 and all(x > 0 and x % vector == 0 for x in lengths):
            return Layout(along, (each, outer, 1) if along == "places" else (each, 1, outer))
    return Layout("any", stride)
