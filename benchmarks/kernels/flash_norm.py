"""Time the norms of per-sample gradients of linear layers, beside compositions of library calls.

    python benchmarks/kernels/flash_norm.py --output runs/flash_norm.json

For each layer two rows. ``norm`` is the squared norm alone: ``kernel`` without and ``bias`` with
the bias's; ``bmm`` multiplies, then squares and adds up what was written, compiled (``eager``: as
it is); ``gram`` multiplies each operand by itself, then both products. ``keep`` keeps the product:
there ``kernel`` is materialize_norm. The floor is the larger of two times: for the floating-point
operations at the rate of a large product, and for the bytes at that of a large copy, both measured
first. ``--sweep`` times the kernel with every tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from unittest import mock

import harness
import torch
from torch import Tensor

from flashnorm_compile.kernels.flash_norm import op, reference, tiling

GPT2 = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
DECODER = ((6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192))
# The vocabulary of 50257, in rows of whole 16 bytes.
HEAD = (50264, 768)
# T, B, and the layers (m, n): outputs by inputs.
WORKLOADS = {
    "gpt2 t1024": (1024, 16, (*GPT2, HEAD)),
    "gpt2 t256": (256, 64, (*GPT2, HEAD)),
    "gpt2 t4096": (4096, 4, (*GPT2, HEAD)),
    "gpt2 t16384": (16384, 1, (*GPT2, HEAD)),
    "decoder t512": (512, 16, DECODER),
    "vit t197": (197, 128, GPT2),
    "bert t128": (128, 256, GPT2),
}
SMOKE = {"smoke": (20, 3, ((48, 32), (8, 40)))}

# Of squares: float32 sums of exact products, and what rounding the products to bfloat16 adds.
TOLERANCE, ROUNDED_TOLERANCE = 1e-4, 1e-3
# Samples that are compared with the reference.
CHECKED = 2


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


def operands(m: int, n: int, tokens: int, samples: int, device: str) -> tuple[Tensor, Tensor]:
    """Return the output's gradient seen as [B, m, T], and the input [B, T, n]."""
    gradient = torch.randn(samples, tokens, m, device=device, dtype=torch.bfloat16)
    return gradient.mT, torch.randn(samples, tokens, n, device=device, dtype=torch.bfloat16)


def bmm(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply, and take norms of what was written."""
    products = torch.bmm(left, right)
    return products, torch.linalg.vector_norm(products, dim=(1, 2), dtype=torch.float32).square()


def gram(left: Tensor, right: Tensor) -> Tensor:
    """Return the sums of L_b^T·L_b times R_b·R_b^T, the ghost norm."""
    if left.is_cuda:
        products = [torch.bmm(x, x.mT, out_dtype=torch.float32) for x in (left.mT, right)]
    else:
        products = [x.float() @ x.float().mT for x in (left.mT, right)]
    return (products[0] * products[1]).sum((1, 2))


def norms_of(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Return the norms alone; compiled, the products are still written."""
    return lambda left, right: function(left, right)[1]


def check(name: str, left: Tensor, right: Tensor, found: dict[str, Tensor]) -> float:
    """Compare squares of the first samples, and sums over tokens; return the kernel's error."""
    some = slice(0, CHECKED)
    expected, bias = reference.flash_norm(left[some].cpu(), right[some].cpu(), True)
    for key, squares in found.items():
        right_ones = bias if key == "bias" else expected
        tolerance = TOLERANCE if key in ("kernel", "bias") else ROUNDED_TOLERANCE
        if key == "gram":
            tolerance = harness.gram_tolerance(left.shape[1], right.shape[2])
        harness.check(f"{name}, {key}", squares[some].cpu(), right_ones, tolerance)
    return harness.check(name, found["kernel"][some].cpu(), expected, TOLERANCE)


def measure(
    name: str, layer: tuple[int, int], tokens: int, samples: int, rates: Rates, device: str
) -> list[dict]:
    """Check and time one layer; return the rows for norms, and for norms and products."""
    torch.manual_seed(0)
    m, n = layer
    left, right = operands(m, n, tokens, samples, device)
    compiled = norms_of(bmm) if device == "cpu" else torch.compile(norms_of(bmm), dynamic=False)
    both = bmm if device == "cpu" else torch.compile(bmm, dynamic=False)
    compiled_gram = gram if device == "cpu" else torch.compile(gram, dynamic=False)
    keep = functools.partial(op.materialize_norm, left, right, torch.bfloat16)
    squares, bias_squares = op.flash_norm(left, right, True)
    found = {"kernel": squares, "bias": bias_squares, "keep": keep()[1]}
    found |= {"bmm": compiled(left, right), "gram": compiled_gram(left, right)}
    error = check(name, left, right, found)

    flops, read = 2.0 * samples * tokens * m * n, 2.0 * samples * tokens * (m + n)
    written = 2.0 * samples * m * n
    norm = {
        "layer": f"{name} norm",
        "floor_ms": max(flops / rates.flops, read / rates.bytes),
        "kernel_ms": harness.median_ms(lambda: op.flash_norm(left, right)),
        "bias_ms": harness.median_ms(lambda: op.flash_norm(left, right, True)),
        "bmm_ms": harness.median_ms(lambda: compiled(left, right)),
        "eager_ms": harness.median_ms(lambda: bmm(left, right)),
        "gram_ms": harness.median_ms(lambda: compiled_gram(left, right)),
        "error": error,
    }
    kept = {
        "layer": f"{name} keep",
        "floor_ms": max(flops / rates.flops, (read + written) / rates.bytes),
        "kernel_ms": harness.median_ms(keep),
        "bmm_ms": harness.median_ms(lambda: both(left, right)),
        "eager_ms": norm["eager_ms"],
    }
    for row in (norm, kept):
        row["gflop"] = flops / 1e9
        row["tflops"] = flops / row["kernel_ms"] / 1e9
        row["of_floor"] = row["kernel_ms"] / row["floor_ms"]
        others = [row[key] for key in ("bmm_ms", "eager_ms", "gram_ms") if key in row]
        row["speed_up"] = min(others) / row["kernel_ms"]
    return [norm, kept]


def sweep(layer: tuple[int, int], tokens: int, samples: int) -> dict[str, float]:
    """Return the TFLOP/s of flash_norm with every tile."""
    from flashnorm_compile.kernels.flash_norm import launch

    left, right = operands(*layer, tokens, samples, "cuda")
    flops = 2.0 * samples * tokens * layer[0] * layer[1]
    found = {}
    for tile in tiling.TENSOR_CORE_TILES[:6]:
        for some in (tile, dataclasses.replace(tile, tokens=32, stages=2 * tile.stages - 2)):
            with mock.patch.object(launch, "choose_tile", return_value=some):
                ms = harness.median_ms(lambda: op.flash_norm(left, right))
            found[f"{some.m}x{some.n}x{some.tokens}"] = flops / ms / 1e9
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--sweep", action="store_true", help="time every tile")
    options = parser.parse_args(arguments)
    device = harness.device(options.smoke)
    rates = measure_rates(device)
    print(f"{rates.flops / 1e9:.0f} TFLOP/s in a product, {rates.bytes / 1e6:.0f} GB/s in a copy")
    table = harness.Table(
        ("layer", "gflop", "floor_ms", "kernel_ms", "bias_ms", "bmm_ms", "eager_ms", "gram_ms",
         "tflops", "of_floor", "speed_up", "error"),
    )  # fmt: skip
    for workload, (tokens, samples, layers) in (SMOKE if options.smoke else WORKLOADS).items():
        for layer in layers:
            name = f"{workload} b{samples} {layer[0]}x{layer[1]}"
            rows = measure(name, layer, tokens, samples, rates, device)
            if options.sweep and device == "cuda":
                rows[0]["tiles"] = sweep(layer, tokens, samples)
            for row in rows:
                table.add(**row)
                for tile, tflops in sorted(row.get("tiles", {}).items(), key=lambda x: -x[1]):
                    print(f"    {tile:20} {tflops:6.1f} TFLOP/s")
            torch._dynamo.reset()
    table.write(options.output)


if __name__ == "__main__":
    main()
