"""Time sums over Gram matrices, the ghost norm and what bounds its error, beside library calls.

    python benchmarks/kernels/ghost_norm.py --output runs/ghost_norm.json

For each layer ``kernel`` is the op; ``pointers`` reads memory without tensor descriptors, ``whole``
makes every tile in one program, ``together`` is a layer's share of a call with 8 of them.
``composed`` is two matrix products and their sums, compiled; ``eager``, as it is. Rows named
``cross`` are inner products of two sites with the same operands, whose rows' norms are known.

The floor is the larger of two times: for the floating-point operations (of one of each two mirror
images, but for inner products) at the rate of a large product, and for the operands, read once, at
the rate of a large copy, both measured first. ``tflops`` counts the same operations.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import harness
import torch
from torch import Tensor

from flashnorm_compile.kernels.ghost_norm import op, planning, reference

GPT2 = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
DECODER = ((6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192), (32000, 2048))
# The vocabulary, as it is and in rows of whole 16 bytes.
HEADS = ((50257, 768), (50264, 768))
# T, B, and the layers (m, n): outputs by inputs.
WORKLOADS = {
    "gpt2 t256": (256, 64, (*GPT2, *HEADS)),
    "gpt2 t1024": (1024, 16, (*GPT2, *HEADS)),
    "decoder t512": (512, 16, DECODER),
    "vit t197": (197, 128, GPT2),
    "bert t128": (128, 256, (*GPT2, (30528, 768))),
    "short t16": (16, 4096, GPT2[:2]),
    "short t50": (50, 1024, GPT2[:2]),
    "few t256": (256, 4, (GPT2[1], HEADS[1])),
}
SMOKE = {"smoke": (20, 3, ((48, 32), (8, 40)))}

# Samples that are compared with the reference.
CHECKED = 2
TOGETHER = 8
ERRORS = (1e-5, 1e-5)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of large library calls: floating-point operations and bytes, per millisecond."""

    flops: float
    bytes: float


def measure_rates(device: str) -> Rates:
    """Time a product and a copy."""
    size = 8192 if device == "cuda" else 256
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    long = torch.empty(size**2 * 8, device=device, dtype=torch.bfloat16)
    flops = 2.0 * size**3 / harness.median_ms(lambda: x @ x)
    return Rates(flops, 2.0 * long.nbytes / harness.median_ms(long.clone))


def gram(x: Tensor, y: Tensor) -> Tensor:
    """Return the products of all rows."""
    return torch.bmm(x, y.mT, out_dtype=torch.float32) if x.is_cuda else x.float() @ y.float().mT


def composed(left: Tensor, right: Tensor) -> Tensor:
    """Return the sums of `op.ghost_norm`."""
    a, g = gram(left.mT, left.mT), gram(right, right)
    first, second = (
        (products.diagonal(dim1=1, dim2=2) * (1 + 2 * error) + reference.FLOOR).sqrt()
        for products, error in zip((a, g), ERRORS, strict=True)
    )
    product, by_left, by_right = pair_sums(a, g, first, second, first, second)
    return torch.stack([product, (first * second).sum(1), by_left, by_right])


def composed_cross(
    left: Tensor, right: Tensor, left2: Tensor, right2: Tensor, *norms: Tensor
) -> Tensor:
    """Return the sums of `op.ghost_product`."""
    return torch.stack(pair_sums(gram(left.mT, left2.mT), gram(right, right2), *norms))


def pair_sums(a: Tensor, g: Tensor, *norms: Tensor) -> list[Tensor]:
    """Sum over pairs of tokens; all go over columns first, for which one read is enough."""
    left, right, left2, right2 = norms
    weighted = ((g, left, left2), (a, right, right2))
    by = [((x.abs() * y2.unsqueeze(1)).sum(2) * y).sum(1) for x, y, y2 in weighted]
    return [(a * g).sum(2).sum(1), *by]


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Let the kernel read by pointers, or make every tile in one program."""
    from flashnorm_compile.kernels.ghost_norm import launch

    if name == "pointers":
        device = launch.find_device(torch.device("cuda", torch.cuda.current_device()))
        pointers = dataclasses.replace(device, descriptors=False)
        with mock.patch.object(launch, "find_device", return_value=pointers):
            yield
    else:
        planning.plan.cache_clear()
        with mock.patch.object(planning, "SPLIT_WIDTH", 2**31):
            yield
        planning.plan.cache_clear()


def measure(
    name: str, layer: tuple[int, int], tokens: int, samples: int, rates: Rates, device: str
) -> list[dict]:
    """Check and time one layer; return the rows for norms and for inner products."""
    torch.manual_seed(0)
    m, n = layer
    gradient = torch.randn(samples, tokens, m, device=device, dtype=torch.bfloat16)
    left, right = gradient.mT, torch.randn(samples, tokens, n, device=device).bfloat16()
    norms = left.float().norm(dim=1), right.float().norm(dim=2)
    some = slice(0, CHECKED)
    expected = reference.ghost_norm(left[some].cpu(), right[some].cpu(), *ERRORS)

    flops, read = 1.0 * samples * tokens * (tokens + 1) * (m + n), 2.0 * samples * tokens * (m + n)
    rows = []
    for kind, kernel, others, operands, factor in (
        ("norm", lambda *x: op.ghost_norm(*x, *ERRORS), composed, (left, right), 1),
        ("cross", op.ghost_product, composed_cross, (left, right) * 2 + norms * 2, 2),
    ):
        compiled = torch.compile(others, dynamic=False) if device == "cuda" else others
        wanted = expected if kind == "norm" else expected[[0, 2, 3]]
        functions: dict[str, Callable[..., Tensor]] = {"kernel": kernel, "composed": compiled}
        functions["eager"] = others
        row = {"layer": f"{name} {kind}", "gflop": factor * flops / 1e9}
        row["floor_ms"] = max(factor * flops / rates.flops, read / rates.bytes)
        tolerance = harness.gram_tolerance(m, n)
        for key, function in functions.items():
            row |= timed(f"{name} {kind}", key, function, operands, wanted, tolerance)
        if device == "cuda" and kind == "norm":
            for key in ("pointers", "whole"):
                with variant(key):
                    row |= timed(f"{name} {kind}", key, kernel, operands, wanted, tolerance)
            row["together_ms"] = together(left, right)
        row["tflops"] = row["gflop"] / row["kernel_ms"]
        row["of_floor"] = row["kernel_ms"] / row["floor_ms"]
        row["speed_up"] = min(row["composed_ms"], row["eager_ms"]) / row["kernel_ms"]
        rows.append(row)
    return rows


def together(left: Tensor, right: Tensor) -> float:
    """Return the milliseconds that one of many layers takes."""
    if TOGETHER * (left.nbytes + right.nbytes) > torch.cuda.mem_get_info()[0]:
        return float("nan")
    lefts, rights = [left], [right]
    for _ in range(TOGETHER - 1):
        lefts.append(left.mT.clone().mT)
        rights.append(right.clone())
    errors = [ERRORS[0]] * TOGETHER
    return harness.median_ms(lambda: op.ghost_norms(lefts, rights, errors, errors)) / TOGETHER


def timed(
    name: str,
    key: str,
    function: Callable[..., Tensor],
    operands: tuple[Tensor, ...],
    expected: Tensor,
    tolerance: float,
) -> dict[str, float]:
    """Check a function on the first samples, then time it on all."""
    found = function(*operands)[:, :CHECKED].cpu()
    for which, (sums, right) in enumerate(zip(found, expected, strict=True)):
        harness.check(f"{name}, {key}, sum {which}", sums, right, tolerance)
    return {f"{key}_ms": harness.median_ms(lambda: function(*operands))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    options = parser.parse_args(arguments)
    device = harness.device(options.smoke)
    rates = measure_rates(device)
    print(f"{rates.flops / 1e9:.0f} TFLOP/s in a product, {rates.bytes / 1e6:.0f} GB/s in a copy")
    table = harness.Table(
        ("layer", "gflop", "floor_ms", "kernel_ms", "pointers_ms", "whole_ms",
         "together_ms", "composed_ms", "eager_ms", "tflops", "of_floor", "speed_up"),
    )  # fmt: skip
    for workload, (tokens, samples, layers) in (SMOKE if options.smoke else WORKLOADS).items():
        for layer in layers if options.only in workload else ():
            name = f"{workload} b{samples} {layer[0]}x{layer[1]}"
            for row in measure(name, layer, tokens, samples, rates, device):
                table.add(**row)
            torch._dynamo.reset()
    table.write(options.output)


if __name__ == "__main__":
    main()
