"""What the benchmarks of single kernels share: command line, check, timing, table."""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

FLUSHED_BYTES = 2**28
TIME_LIMIT_S = 0.5


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that all kernels have."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--smoke", action="store_true", help="tiny shapes, also without a GPU")
    result.add_argument("--output", type=pathlib.Path, help="write the rows to this JSON file")
    return result


def device(smoke: bool) -> str:
    """Return where to run; without a GPU there is nothing to time but a smoke test."""
    if torch.cuda.is_available():
        return "cuda"
    if smoke:
        return "cpu"
    raise SystemExit("needs a CUDA device; --smoke runs without")


def machine() -> dict[str, str]:
    """Return what the numbers depend on."""
    found = {"torch": torch.__version__, "device": "CPU"}
    if torch.cuda.is_available():
        import triton

        found |= {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
    return found


def gram_tolerance(m: int, n: int) -> float:
    """Return how far sums over Gram matrices of rows of m and n 16-bit numbers may be off.

    Tensor cores do not round, they truncate: the error grows with the products that are added up.
    """
    return 1e-4 + 2 * max(m, n) * 2.0**-26


def check(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """Return ‖found - expected‖/‖expected‖; end the program if that is too much, or NaN."""
    difference = (found.double() - expected.double()).norm()
    error = (difference / expected.double().norm()).item()
    if not error <= tolerance:
        raise SystemExit(f"{name} is wrong: relative error {error:.1e}, tolerance {tolerance:.0e}")
    return error


def median_ms(function: Callable[[], Any]) -> float:
    """Return the median time of a call.

    On a GPU: of a CUDA graph of the call, so that the host's part is left out, with nothing in the
    L2 cache.
    """
    if torch.cuda.is_available():
        return _events_ms(function)
    function()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _events_ms(function: Callable[[], Any]) -> float:
    function()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    first = max(replay() for _ in range(3))
    count = max(10, min(100, int(1e3 * TIME_LIMIT_S / max(first, 1e-3))))
    return statistics.median(replay() for _ in range(count))


class Table:
    """Rows that are printed as they come, and written as JSON in the end."""

    def __init__(self, columns: Sequence[str], width: int = 10) -> None:
        self.columns = columns
        self.width = width
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Print one row; the first column is as wide as its names need."""
        if not self.rows:
            print(", ".join(machine().values()))
            print(self._line({column: column.replace("_", " ") for column in self.columns}))
        self.rows.append(row)
        print(self._line(row), flush=True)

    def write(self, output: pathlib.Path | None) -> None:
        """Write what was measured, where, and by which command."""
        if output is None:
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        full = {"command": shlex.join(sys.argv), "machine": machine(), "rows": self.rows}
        output.write_text(json.dumps(full, indent=1))

    def _line(self, row: dict[str, Any]) -> str:
        cells = [_text(row.get(column, "")) for column in self.columns]
        first, *others = cells
        return first.ljust(28) + "".join(cell.rjust(self.width) for cell in others)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
