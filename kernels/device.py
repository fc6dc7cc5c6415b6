"""What kernels are launched for: facts of a GPU, and the precision that is asked for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.util import find_spec

import torch


@dataclass(frozen=True)
class Device:
    """What counts of a GPU.

    Attributes:
        processors: multiprocessors.
        shared: bytes of shared memory that a program may have.
        descriptors: whether it reads memory by tensor descriptors.
        hopper: whether it is Hopper or data centres' Blackwell: they have shared memory for large
            tiles, and tensor cores that descriptors feed. Other Blackwells' are like Ampere's.
        interpreted: whether it is the CPU, on which Triton interprets.
    """

    processors: int
    shared: int
    descriptors: bool
    hopper: bool
    interpreted: bool = False


# Few processors, so that programs go through several tiles and samples, and split others.
INTERPRETER = Device(
    processors=3, shared=232448, descriptors=True, hopper=True, interpreted=True
)


@functools.lru_cache
def find_device(device: torch.device) -> Device:
    """Look up a GPU; a CPU, where the interpreter runs, stands in for a small one."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return Device(
        processors=properties.multi_processor_count,
        # Not in torch's type stubs.
        shared=getattr(properties, "shared_memory_per_block_optin", 49152),
        descriptors=properties.major >= 9,
        hopper=properties.major in (9, 10),
    )


def has_fast_kernels(device: torch.device) -> bool:
    """Whether the kernels are as fast as they were measured: earlier GPUs have smaller tiles."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return there and find_spec("triton") is not None and find_device(device).hopper


def float32_precision() -> str:
    """Return Triton's name for how float32 is multiplied: "tf32" where PyTorch allows it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
