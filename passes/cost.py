"""What a strategy costs on a device: a roofline puts FLOPs and bytes on one scale.

A kernel takes the longer of its arithmetic and its memory traffic (Williams, Waterman and Patterson
2009, doi 10.1145/1498765.1498785), and never less than its launch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Parts of the peak that large matrix products and streaming kernels reach.
_MATMUL_EFFICIENCY = 0.7
_BANDWIDTH_EFFICIENCY = 0.85
_LAUNCH_SECONDS = 2e-6

# To keep a byte until clipping may cost what an H200 takes to write and read it.
_SECONDS_PER_KEPT_BYTE = 5e-13

# Dense FLOPs per clock and multiprocessor, by compute capability: 16-bit with float32 sums, and
# float64. From NVIDIA's architecture papers; an unknown one counts as the latest before it.
_FLOPS_PER_CLOCK = {
    (7, 0): (1024, 128),
    (7, 5): (1024, 4),
    (8, 0): (2048, 256),
    (8, 6): (1024, 4),
    (9, 0): (4096, 256),
    (10, 0): (8192, 128),
    (12, 0): (1024, 4),
}
_FLOAT32_PER_CLOCK = 256
# Of an H100, where nothing is told: clocks in kHz, bus in bits.
_CLOCK, _MULTIPROCESSORS, _MEMORY_CLOCK, _BUS_WIDTH = 1_830_000, 132, 2_619_000, 5120

# Of one core: two 256-bit multiply-adds in a clock, and its share of the memory's bandwidth.
_CORE_FLOPS, _CORE_BANDWIDTH = 6e10, 1e10


@dataclass(frozen=True)
class Cost:
    """Predicted work of a strategy beyond the non-private step, per batch.

    Attributes:
        seconds: time.
        flops: of additional matrix products.
        bytes: read and written.
        kept: bytes that live from the backward until the clipping factors are known.
    """

    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    kept: float = 0.0

    @property
    def price(self) -> float:
        """What is compared: seconds, and some for what is kept, which users run out of first."""
        return self.seconds + self.kept * _SECONDS_PER_KEPT_BYTE

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.kept + other.kept,
        )


@dataclass(frozen=True)
class Device:
    """Speeds that ordinary kernels reach.

    Attributes:
        matmul: FLOP/s of matrix products by the dtype of their operands.
        bandwidth: bytes/s that a kernel reads and writes.
        launch: seconds that a kernel takes at least.
    """

    matmul: Mapping[torch.dtype, float]
    bandwidth: float
    launch: float

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """Look a device up; one that is not there (a traced graph's) counts as an H100."""
        if device.type == "cpu":
            return _cpu(torch.get_num_threads())
        return _gpu(device.index or 0, torch.backends.cuda.matmul.allow_tf32)

    def multiply(self, flops: float, dtype: torch.dtype, moved: float) -> Cost:
        """Predict a matrix product from its FLOPs and the bytes it reads and writes."""
        rate = self.matmul.get(dtype, self.matmul[torch.float32])
        seconds = max(flops / rate, moved / self.bandwidth, self.launch)
        return Cost(seconds=seconds, flops=flops, bytes=moved)

    def move(self, *moved: float) -> Cost:
        """Predict kernels that read and write so many bytes each."""
        seconds = sum(max(each / self.bandwidth, self.launch) for each in moved)
        return Cost(seconds=seconds, bytes=sum(moved))


@functools.cache
def _cpu(threads: int) -> Device:
    cores = min(threads, os.cpu_count() or 1)
    single = cores * _CORE_FLOPS
    rates = {torch.float32: single, torch.float64: single / 2}
    return Device(rates, cores * _CORE_BANDWIDTH, _LAUNCH_SECONDS)


@functools.cache
def _gpu(index: int, allow_tf32: bool) -> Device:
    there = torch.cuda.is_available()
    found: Any = torch.cuda.get_device_properties(index) if there else None
    capability = (getattr(found, "major", 9), getattr(found, "minor", 0))
    known = max((each for each in _FLOPS_PER_CLOCK if each <= capability), default=(7, 0))
    half, double = _FLOPS_PER_CLOCK[known]
    tf32 = allow_tf32 and capability >= (8, 0)
    clock = 1e3 * (getattr(found, "clock_rate", None) or _CLOCK) * _MATMUL_EFFICIENCY
    clocks = clock * getattr(found, "multi_processor_count", _MULTIPROCESSORS)
    rates = {
        torch.bfloat16: half * clocks,
        torch.float16: half * clocks,
        torch.float32: (half // 2 if tf32 else _FLOAT32_PER_CLOCK) * clocks,
        torch.float64: double * clocks,
    }
    memory_clock = 1e3 * (getattr(found, "memory_clock_rate", None) or _MEMORY_CLOCK)
    width = getattr(found, "memory_bus_width", None) or _BUS_WIDTH
    # Both edges of the memory's clock carry data; a byte has 8 bits.
    return Device(rates, 2 * memory_clock * width / 8 * _BANDWIDTH_EFFICIENCY, _LAUNCH_SECONDS)
