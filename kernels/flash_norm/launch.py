"""From tensors to kernels: layouts, tiles and scratch memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashnorm_compile.kernels.flash_norm import kernel
from flashnorm_compile.kernels.flash_norm.tiling import (
    Tile,
    cdiv,
    choose_tile,
    count_splits,
    count_stages,
    round_up,
)

# Numbers that a program adds up where tokens were split.
BLOCK = 2048


@dataclass(frozen=True)
class Device:
    """What counts of a GPU.

    Attributes:
        processors: multiprocessors.
        shared: bytes of shared memory that a program may have.
        descriptors: whether it reads memory by tensor descriptors, fast enough for large tiles.
        interpreted: whether it is the CPU, on which Triton interprets.
    """

    processors: int
    shared: int
    descriptors: bool
    interpreted: bool = False


@dataclass(frozen=True)
class Operand:
    """A tensor [B, T, width], and how a program reads it.

    Attributes:
        tensor: the tensor.
        layout: "places" or "tokens", whichever lie side by side, by a tensor descriptor; or
            "pointers".
        strides: of samples, tokens and places.
    """

    tensor: Tensor
    layout: str
    strides: tuple[int, int, int]


# Few processors, so that each goes through several tiles.
INTERPRETER = Device(processors=3, shared=232448, descriptors=True, interpreted=True)


def flash_norm(left: Tensor, right: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """`op.flash_norm` for CUDA tensors. Does not synchronise with the host."""
    if 0 in (*left.shape, right.shape[2]):
        # Nothing to multiply, but perhaps left to sum.
        squares = left.new_zeros(left.shape[0], dtype=torch.float32)
        sums = left.sum(2, dtype=torch.float32)
        return squares, sums.square().sum(1) if bias else sums.new_empty(0)
    with torch.cuda.device_of(left):
        return _products(left, right, None, bias)


def materialize_norm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`op.materialize_norm` for CUDA tensors. Does not synchronise with the host."""
    (samples, m, tokens), n = left.shape, right.shape[2]
    out = left.new_empty((samples, m, n), dtype=out_dtype)
    if 0 in (samples, m, tokens, n):
        return out.zero_(), left.new_zeros(samples, dtype=torch.float32)
    with torch.cuda.device_of(left):
        return out, _products(left, right, out, False)[0]


def _products(
    left: Tensor, right: Tensor, out: Tensor | None, bias: bool
) -> tuple[Tensor, Tensor]:
    """Return the squares of the products and of the bias; write the products to ``out``."""
    device = _device(left.device)
    operands = _read(left.transpose(1, 2), device), _read(right, device)
    (samples, m, tokens), n = left.shape, right.shape[2]
    described = all(operand.layout != "pointers" for operand in operands)
    tile = choose_tile(m, n, tokens, left.dtype, described)
    rows, columns = cdiv(m, tile.m), cdiv(n, tile.n)
    programs = device.processors * tile.per_processor
    splits = count_splits(samples * rows * columns, tokens, tile, programs)

    def scratch(*shape: int) -> Tensor:
        return left.new_empty(shape, dtype=torch.float32)

    if splits == 1:
        squares = scratch(samples, rows * columns)
        sums = scratch(samples, rows) if bias else squares
        _launch(*operands, out, squares, sums, 1, programs, tile, device, bias)
    else:
        # Rows of 16 bytes, for descriptors.
        parts = scratch(samples, splits, m, round_up(n, 4))
        sums = scratch(samples, splits, m) if bias else parts
        _launch(*operands, parts, parts, sums, splits, programs, tile, device, bias)
        squares = _add_parts(parts, out)
        sums = _add_parts(sums, None) if bias else sums
    return squares.sum(1), sums.sum(1) if bias else scratch(0)


def _launch(
    left: Operand,
    right: Operand,
    out: Tensor | None,
    squares: Tensor,
    sums: Tensor,
    splits: int,
    programs: int,
    tile: Tile,
    device: Device,
    bias: bool,
) -> None:
    """Start `kernel.products_kernel`, which describes the arguments."""
    (samples, tokens, m), n = left.tensor.shape, right.tensor.shape[2]
    width, writing, out_dtype = n, "none", None
    if out is not None:
        width, out_dtype = out.shape[-1], out.dtype
        aligned = width * out_dtype.itemsize % 16 == 0
        writing = "descriptor" if aligned and device.descriptors else "pointers"
    if device.descriptors and not device.interpreted:
        # Of the calling thread, and of nothing else: the backward has threads of its own.
        triton.set_allocator(_allocate)
    tiles = samples * splits * cdiv(m, tile.m) * cdiv(n, tile.n)
    kernel.products_kernel[(min(tiles, programs),)](
        left.tensor,
        right.tensor,
        squares if out is None else out,
        squares,
        sums,
        samples,
        tokens,
        m,
        n,
        width,
        *left.strides,
        *right.strides,
        splits,
        cdiv(cdiv(tokens, tile.tokens), splits),
        LEFT=left.layout,
        RIGHT=right.layout,
        OUT=writing,
        SPLIT=splits > 1,
        BIAS=bias,
        PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        UPCAST=device.interpreted,
        BLOCK_T=tile.tokens,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        num_warps=tile.warps,
        num_stages=count_stages(tile, left.tensor.dtype, out_dtype, device.shared),
    )


def _add_parts(parts: Tensor, out: Tensor | None) -> Tensor:
    """Add up [B, splits, ...] over splits; return sums of squares [B, chunks], fill ``out``."""
    samples, splits, size = parts.shape[0], parts.shape[1], parts[0, 0].numel()
    chunks = cdiv(size, BLOCK)
    squares = parts.new_empty(samples, chunks)
    kernel.add_parts_kernel[(samples * chunks,)](
        parts,
        squares if out is None else out,
        squares,
        splits,
        chunks,
        size,
        parts.shape[-1],
        parts.shape[-1] if out is None else out.shape[-1],
        STORE=out is not None,
        BLOCK=BLOCK,
    )
    return squares


def _read(x: Tensor, device: Device) -> Operand:
    """Return how [B, T, width] is read.

    By a descriptor if one dim is contiguous and all else a multiple of 16 bytes. Strides of dims
    of size 1 mean nothing; they are replaced by some that serve.
    """
    samples, tokens, width = x.shape
    sample, token, place = x.stride()
    if device.descriptors and x.data_ptr() % 16 == 0:
        vector = 16 // x.element_size()
        for layout, inner, outer, inner_size, outer_size in (
            ("places", place, token, width, tokens),
            ("tokens", token, place, tokens, width),
        ):
            inner = 1 if inner_size == 1 else inner
            outer = round_up(inner_size, vector) if outer_size == 1 else outer
            each = outer * outer_size if samples == 1 else sample
            # A stride of 0 (of an expanded tensor) is left to pointers.
            if inner == 1 and all(s > 0 and s % vector == 0 for s in (outer, each)):
                strides = (each, outer, 1) if layout == "places" else (each, 1, outer)
                return Operand(x, layout, strides)
    return Operand(x, "pointers", (sample, token, place))


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Give Triton memory for the descriptors of a launch, on the current device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@functools.lru_cache
def _device(device: torch.device) -> Device:
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return Device(
        processors=properties.multi_processor_count,
        # Not in torch's type stubs.
        shared=getattr(properties, "shared_memory_per_block_optin", 49152),
        # Blackwell's consumer GPUs (12) have descriptors, but tensor cores like Ampere's.
        descriptors=properties.major in (9, 10),
    )
