"""Where the time goes: kernels of a step, and the difference between two methods."""

from __future__ import annotations

import json
import pathlib
import re
import tempfile
from collections import Counter, defaultdict
from typing import Any

import torch
from methods import Method
from timing import synchronize

# First match wins; names as Inductor, cuBLAS, cuDNN and PyTorch give them. Inductor's own come
# first: they list the operations that they fuse.
FAMILIES = (
    ("noise", r"add_noise|release_kernel"),
    ("optimizer", r"multi_tensor_apply|fused_adam"),
    ("triton reduction", r"^triton_(red|per|split)"),
    ("triton pointwise", r"^triton_(poi|for)"),
    ("attention", r"flash(_|::)|fmha|sdpa|attention"),
    ("convolution", r"conv(?!ert)|implicit_gemm|dgrad|wgrad|fprop"),
    ("matrix product", r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitk|triton_tem|aten::(add|b)?mm"),
    ("embedding and sort", r"embedding|index_put|indexing_backward|radix|sort|scatter|krn_partial"),
    ("copy and fill", r"memcpy|memset|copy_|fill"),
)
_TIMED = {"kernel", "gpu_memcpy", "gpu_memset"}


def profile(method: Method, steps: int = 5) -> dict[str, Any]:
    """Run steps under ``torch.profiler``.

    Returns:
        "kernels": [name, calls per step, ms per step], by time; "busy_ms": their sum; "span_ms":
        from a step's first kernel to the next step's. On a CPU, operators take kernels' place.
    """
    device = method.settings.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(steps):
            method.run()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    wanted = _TIMED if device == "cuda" else {"cpu_op"}
    timed = [event for event in events if event.get("cat") in wanted and "dur" in event]
    calls: Counter[str] = Counter()
    total: defaultdict[str, float] = defaultdict(float)
    for event in timed:
        calls[event["name"]] += 1
        total[event["name"]] += event["dur"] / 1e3
    by_time = sorted(total, key=lambda name: -total[name])
    kernels = [[name, calls[name] / steps, total[name] / steps] for name in by_time]
    begin = min((event["ts"] for event in timed), default=0.0)
    end = max((event["ts"] + event["dur"] for event in timed), default=0.0)
    return {
        "kernels": kernels,
        "busy_ms": sum(total.values()) / steps,
        "span_ms": (end - begin) / 1e3 / steps,
    }


def kernels_per_step(found: dict[str, Any]) -> float:
    """Return how many kernels a profiled step ran."""
    return sum(calls for _, calls, _ in found["kernels"])


def family(kernel: str) -> str:
    """Return the family a kernel's name belongs to."""
    for name, pattern in FAMILIES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    return "other"


def describe(profiles: dict[str, dict[str, Any]], top: int = 40) -> str:
    """Write the kernels of every method, and the differences from the first, as text."""
    parts = [_families(profiles)]
    for method, found in profiles.items():
        lines = [
            f"{method}: kernels {found['busy_ms']:.2f} ms of {found['span_ms']:.2f} ms a step",
            f"{'ms':>9} {'calls':>7}  family             kernel",
        ]
        for name, calls, ms in found["kernels"][:top]:
            lines.append(f"{ms:9.3f} {calls:7.1f}  {family(name):18} {name[:150]}")
        rest = found["kernels"][top:]
        lines.append(f"{sum(ms for *_, ms in rest):9.3f} {'':7}  ({len(rest)} more kernels)")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _families(profiles: dict[str, dict[str, Any]]) -> str:
    sums = {method: _sums(found["kernels"]) for method, found in profiles.items()}
    baseline = next(iter(sums))
    found = {name for each in sums.values() for name in each}
    names = sorted(found, key=lambda name: -sums[baseline][name])
    others = [method for method in sums if method != baseline]
    header = f"{'ms a step':20}{baseline:>12}" + "".join(
        f"{method:>24}{'difference':>12}" for method in others
    )
    lines = [header]
    for name in [*names, "all"]:
        values = {m: sum(s.values()) if name == "all" else s[name] for m, s in sums.items()}
        line = f"{name:20}{values[baseline]:12.2f}"
        for method in others:
            line += f"{values[method]:24.2f}{values[method] - values[baseline]:+12.2f}"
        lines.append(line)
    return "\n".join(lines)


def _sums(kernels: list[list[Any]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, _, ms in kernels:
        found[family(name)] += ms
    return found
