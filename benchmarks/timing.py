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

    ``peak_bytes`` counts everything that is alive during the step (weights, batch, gradients,
    activations); None on a CPU.
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
    """Time steps one after the other; what ``prepare`` does (zero_grad) is not timed.

    On a GPU between events, without synchronising between steps, as a training loop runs.
    """
    device = method.settings.device
    for _ in range(warmup):
        method.prepare()
        method.run()
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        times = _events(method, iterations)
        peak = torch.cuda.max_memory_allocated()
    else:
        times, peak = _clock(method, iterations), None
    return Timing(statistics.median(times), min(times), max(times), iterations, peak)


def _events(method: Method, iterations: int) -> list[float]:
    pairs = []
    for _ in range(iterations):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        method.prepare()
        start.record()
        method.run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _clock(method: Method, iterations: int) -> list[float]:
    times = []
    for _ in range(iterations):
        method.prepare()
        start = time.perf_counter()
        method.run()
        times.append(1e3 * (time.perf_counter() - start))
    return times
