"""Time and peak memory of a step."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from methods import Method


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step over the iterations, and its peak memory.

    ``peak_bytes`` counts everything that is alive during the step (weights, optimizer state,
    batch, gradients, activations); None on a CPU. Where kernels are replayed as CUDA graphs it is
    what the allocator reserved: what is alive inside of a replay is not known to it.
    """

    median_ms: float
    min_ms: float
    max_ms: float
    iterations: int
    peak_bytes: int | None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(method: Method, *, warmup: int, iterations: int) -> Timing:
    """Time steps one after the other.

    On a GPU between events, without synchronising between steps, as a training loop runs.
    """
    device = method.settings.device
    for _ in range(warmup):
        method.run()
    synchronize(device)
    if device != "cuda":
        times, peak = _clock(method, iterations), None
    else:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        times = _events(method, iterations)
        reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        peak = reserved if method.graphs else allocated
    return Timing(statistics.median(times), min(times), max(times), iterations, peak)


def _events(method: Method, iterations: int) -> list[float]:
    # One step more than are timed: memory that was given back is taken again in the first.
    pairs = []
    for _ in range(iterations + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        method.run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs[1:]]


def _clock(method: Method, iterations: int) -> list[float]:
    times = []
    for _ in range(iterations):
        start = time.perf_counter()
        method.run()
        times.append(1e3 * (time.perf_counter() - start))
    return times
