"""Time the clipped gradients of linear layers, beside what they take without the kernel.

    python benchmarks/kernels/weighted_gradient.py --output runs/weighted_gradient.json

``mm`` is the product alone, of nobody's privacy: the floor. ``copies`` weights a copy of one
operand, leaves samples out of a copy of the other, both compiled, and multiplies. ``kernel`` is
one call of the op: for a layer, or for all layers of some blocks. ``--sweep`` times it with every
tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from torch import Tensor

from flashnorm_compile.kernels.division import cdiv
from flashnorm_compile.kernels.weighted_gradient import op, tiling
from flashnorm_compile.passes.layout import SampleAxis, masked_scale

GPT2 = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
DECODER = ((6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192))
# T, B, a block's layers (m, n), outputs by inputs; how many blocks, 32 layers being one launch; the
# vocabulary, in rows of whole 16 bytes.
WORKLOADS = {
    "gpt2 t1024 b16": (1024, 16, GPT2, 8, ((50264, 768),)),
    "gpt2 t256 b64": (256, 64, GPT2, 8, ((50264, 768),)),
    "decoder t512 b16": (512, 16, DECODER, 8, ((32000, 2048),)),
    "vit t197 b128": (197, 128, GPT2, 8, ()),
    "bert t128 b256": (128, 256, GPT2, 8, ()),
}
SMOKE = {"smoke t20 b3": (20, 3, ((48, 32), (8, 40)), 2, ())}

# Of what is compared with float64: float32 sums over up to 32768 tokens, by tensor cores, which
# cut what does not fit off. That of the copies is what rounding weights into 16 bits costs.
TOLERANCE, COPIES_TOLERANCE = 1e-4, 1e-2

COLUMNS = ("layer", "mm_ms", "copies_ms", "kernel_ms", "mm_tflops", "kernel_tflops", "speed_up",
           "of_mm", "error", "copies_error")  # fmt: skip

Pair = tuple[Tensor, Tensor]


def operands(layer: tuple[int, int], tokens: int, samples: int, device: str) -> Pair:
    """Return the output's gradient, seen as left [m, B·T], and the input, right [B·T, n]."""
    m, n = layer
    gradient = torch.randn(samples * tokens, m, device=device, dtype=torch.bfloat16)
    return gradient.t(), torch.randn(samples * tokens, n, device=device, dtype=torch.bfloat16)


def sample_weights(samples: int, device: str) -> Tensor:
    """Return weights; about a tenth of the samples is left out."""
    weights = torch.rand(samples, device=device) + 0.1
    weights[3::10] = 0.0
    return weights


def by_sample(pair: Pair, samples: int) -> Pair:
    """View operands as [B, m, T] and [B, T, n]."""
    left, right = pair
    return left.t().unflatten(0, (samples, -1)).mT, right.unflatten(0, (samples, -1))


def kernel(pairs: Sequence[Pair], weights: Tensor) -> list[Tensor]:
    """Call the op."""
    lefts, rights = zip(*(by_sample(pair, weights.shape[0]) for pair in pairs), strict=True)
    return op.weighted_gradients(list(lefts), list(rights), weights)


def mm(left: Tensor, right: Tensor) -> Tensor:
    """Multiply with a float32 result."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def copies(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """Weight the narrower operand, leave samples out of both."""
    tokens = right.shape[0] // weights.shape[0]
    narrow = left.shape[0] <= right.shape[1]
    left = masked_scale(SampleAxis(1, 1, tokens), left, weights, scale=narrow)
    right = masked_scale(SampleAxis(0, 1, tokens), right, weights, scale=not narrow)
    return mm(left, right)


def measure(pairs: Sequence[Pair], weights: Tensor) -> dict[str, Any]:
    """Check and time some layers."""
    compiled = torch.compile(copies, dynamic=False) if weights.is_cuda else copies
    errors, copies_errors = [], []
    for pair, found in zip(pairs, kernel(pairs, weights), strict=True):
        left, right = by_sample(pair, weights.shape[0])
        expected = op.weighted_gradient(left.double(), right.double(), weights)
        errors.append(harness.check("kernel", found, expected, TOLERANCE))
        other = compiled(*pair, weights)
        copies_errors.append(harness.check("copies", other, expected, COPIES_TOLERANCE))
    del expected, found, other

    def each(function: Callable[..., Tensor], *more: Tensor) -> None:
        for left, right in pairs:
            function(left, right, *more)

    times = {
        "mm_ms": harness.median_ms(lambda: each(mm)),
        "copies_ms": harness.median_ms(lambda: each(compiled, weights)),
        "kernel_ms": harness.median_ms(lambda: kernel(pairs, weights)),
    }
    flops = sum(2.0 * left.numel() * right.shape[1] for left, right in pairs)
    return times | {
        "mm_tflops": flops / times["mm_ms"] / 1e9,
        "kernel_tflops": flops / times["kernel_ms"] / 1e9,
        "speed_up": times["copies_ms"] / times["kernel_ms"],
        "of_mm": times["kernel_ms"] / times["mm_ms"],
        "error": max(errors),
        "copies_error": max(copies_errors),
    }


def sweep(pairs: Sequence[Pair], weights: Tensor) -> dict[str, float]:
    """Return the TFLOP/s of every tile, with as many parts as are chosen for it."""
    from flashnorm_compile.kernels.weighted_gradient import launch

    device = launch.find_device(weights.device)
    sites = []
    for pair in pairs:
        left, right = by_sample(pair, weights.shape[0])
        sites.append(launch.describe_site(left, right, device))
    tokens = right.shape[1]
    flops = sum(2.0 * left.numel() * right.shape[1] for left, right in pairs)
    found = {}
    for tile in tiling.LARGE_TILES + tiling.SMALL_TILES:
        for size, stages in ((tile.tokens, tile.stages), *tiling.SHORT_STEPS[:1]):
            some = dataclasses.replace(tile, tokens=size, stages=stages)
            way = launch.choose_way(*sites[0], device)
            way = dataclasses.replace(way, tile=some, steps=cdiv(tokens, size))
            run = functools.partial(launch.launch, sites, weights, way, device, None)
            name = f"{tile.m} x {tile.n} x {size}, {tile.warps} warps"
            found[name] = flops / harness.median_ms(run) / 1e9
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--sweep", action="store_true", help="time every tile")
    options = parser.parse_args(arguments)
    device = harness.device(options.smoke)
    table = harness.Table(COLUMNS, width=15)
    torch.manual_seed(0)
    for workload, work in (SMOKE if options.smoke else WORKLOADS).items():
        tokens, samples, block, blocks, others = work
        weights = sample_weights(samples, device)
        rows = {f"{m}x{n}": [(m, n)] for m, n in (*block, *others)}
        rows[f"{blocks} blocks"] = list(block) * blocks
        for name, layers in rows.items():
            pairs = [operands(layer, tokens, samples, device) for layer in layers]
            row = measure(pairs, weights)
            if options.sweep and device == "cuda":
                row["tiles"] = sweep(pairs, weights)
            table.add(layer=f"{workload} {name}", **row)
            for tile, tflops in row.get("tiles", {}).items():
                print(f"    {tile:28} {tflops:6.1f} TFLOP/s")
            del pairs
    table.write(options.output)


if __name__ == "__main__":
    main()
