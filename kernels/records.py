"""Many tensors in one launch: each is a record of integers, and each program finds its own.

The first field of a record is the tensor's first program.
"""

# Triton gives kernel arguments their types.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# Records of one launch. More are cut into the longest of these, and what is left is padded to the
# next, so that few variants are compiled. 32 of 13 fields take 3.3 of the 4 KiB a launch may pass.
LENGTHS = (1, 8, 32)

# Added by `encode`; a code is odd and 2**62 or more.
_BASE: tl.constexpr = tl.constexpr(2**61)


def encode(value: int) -> int:
    """Return an integer that Triton compiles for as for any other.

    Triton 3.6 compiles a kernel again if an integer in a tuple becomes 1, a multiple of 16 or
    longer than 32 bits; ``do_not_specialize`` does not reach into tuples. Addresses go this way
    too: as tensors they would cost the launch a query to the driver each.
    """
    return 2 * (value + 2**61) + 1


def encode_records(
    records: Sequence[tuple[int, ...]], programs: int
) -> tuple[tuple[int, ...], ...]:
    """Return a kernel's argument: as many records of codes as the next of `LENGTHS`.

    Args:
        records: at most as many as the longest.
        programs: of all of them.
    """
    codes = [tuple(map(encode, record)) for record in records]
    length = next(length for length in LENGTHS if length >= len(codes))
    # No program is left for what pads them.
    codes += [(encode(programs), *codes[-1][1:])] * (length - len(codes))
    return tuple(codes)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return what the elements at an address are."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit
def decode(code):
    """Undo `encode`."""
    return (code >> 1) - _BASE


@triton.jit
def pointer(code, DTYPE: tl.constexpr, ALONG: tl.constexpr):
    """Return the pointer to an operand, with what its `operands.Layout` promises."""
    ptr = decode(code).to(tl.pointer_type(DTYPE))
    return ptr if ALONG == "any" else tl.multiple_of(ptr, 16)


@triton.jit
def find_record(records, program, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Return the program's record, the last of these that starts at or before it, in codes.

    By unrolled selections: an argument cannot be indexed at run time.
    """
    if HIGH - LOW == 1:
        return records[LOW]
    else:
        MIDDLE: tl.constexpr = (LOW + HIGH) // 2
        first = find_record(records, program, LOW, MIDDLE)
        second = find_record(records, program, MIDDLE, HIGH)
        # The low words of codes compare as what they stand for.
        later = program * 2 + 1 >= records[MIDDLE][0].to(tl.int32)
        fields = ()
        for field in tl.static_range(len(first)):
            fields += (tl.where(later, second[field], first[field]),)  # type: ignore[assignment]
        return fields
