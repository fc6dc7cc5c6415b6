"""Gradients of convolution weights by sample: kernels, patches with products, and cuDNN.

    python benchmarks/kernels/convolution.py --models wrn16-4-b512 --output runs/convolution.json

A row is a distinct convolution of a model: the three ops, with the speed of the second; unfolded
patches, products and squares under torch.compile, which the first two replace; the convolution of a
gradient that was scaled in float32, which the third replaces; and cuDNN's gradient of the weight,
which is not by sample: the floor. Results are checked against the composition in float32 first, on
a few samples. Times are medians in ms.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import harness
from models import find_workload, tiny_name

from flashnorm_compile.kernels.convolution import (
    convolution_norm,
    convolution_samples,
    convolution_weighted,
    reference,
)

COLUMNS = (
    "shape", "times", "samples", "norm", "weighted", "norm_tflops", "patches", "scaled", "cudnn",
    "patches_ratio", "scaled_ratio",
)  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
CHECKED_SAMPLES = 3
TOLERANCES = {torch.bfloat16: 5e-3, torch.float32: 1e-5}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A convolution of a model, with the shapes that it sees."""

    gradient: tuple[int, ...]
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        pairs = (self.kernel, self.stride, self.padding, self.dilation)
        a, b, c, d = (list(pair) for pair in pairs)
        return a, b, c, d, self.groups

    @property
    def flops(self) -> float:
        return 2.0 * torch.Size(self.gradient).numel() * torch.Size(self.weight[1:]).numel()

    @property
    def weight(self) -> tuple[int, ...]:
        return self.gradient[1], self.input[1] // self.groups, *self.kernel

    def __str__(self) -> str:
        (batch, outer), (inner, height, width) = self.gradient[:2], self.input[1:]
        kernel = "x".join(map(str, self.kernel))
        return f"{batch}x {inner}>{outer} {kernel}/{self.stride[0]} {height}x{width}"


def shapes_of(workload: str) -> Counter[Shape]:
    """Count the distinct convolutions of a model, without computing anything."""
    found: Counter[Shape] = Counter()

    def see(module: torch.nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        pads = module.padding
        assert not isinstance(pads, str)
        shape = Shape(
            tuple(output.shape), tuple(inputs[0].shape), tuple(module.kernel_size),
            tuple(module.stride), tuple(pads), tuple(module.dilation), module.groups,
        )  # fmt: skip
        found[shape] += 1

    with torch.device("meta"):
        chosen = find_workload(workload)
        model = chosen.build()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(see)
        model(chosen.inputs(chosen.batch_size)[0])
    return found


def patches(gradient: Tensor, input: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Unfold, multiply, square."""
    kernel, stride, padding, dilation, groups = shape.geometry
    inner = functional.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    for d in range(2):
        span = dilation[d] * (kernel[d] - 1) + 1
        inner = inner.unfold(2 + d, span, stride[d])[..., :: dilation[d]]
    inner = inner.unflatten(1, (groups, -1)).permute(0, 1, 2, 5, 6, 3, 4)
    inner = inner.reshape(len(input), groups, -1, gradient.shape[2] * gradient.shape[3])
    outer = gradient.reshape(len(gradient), groups, -1, inner.shape[-1])
    samples = torch.matmul(outer, inner.mT).reshape(-1, *shape.weight)
    return samples, samples.float().square().flatten(1).sum(1)


def weight_gradient(gradient: Tensor, input: Tensor, shape: Shape) -> Tensor:
    """The sum over samples: cuDNN, on a GPU."""
    _, stride, padding, dilation, groups = shape.geometry
    weight = gradient.new_empty(shape.weight)
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(
        gradient, input, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )[1]


def scaled(gradient: Tensor, input: Tensor, weights: Tensor, shape: Shape) -> Tensor:
    """What is done where there is no kernel: rounded to nothing less than float32."""
    gradient = gradient.float() * weights.view(-1, 1, 1, 1)
    return weight_gradient(gradient, input.float(), shape)


def check(gradient: Tensor, input: Tensor, weights: Tensor, shape: Shape) -> None:
    """Compare the ops with the specification on the first samples."""
    dtype, few = gradient.dtype, slice(CHECKED_SAMPLES)
    right = reference.samples(gradient[few].double(), input[few].double(), *shape.geometry)
    squares = reference.squares(right)
    samples, found = convolution_samples(gradient, input, *shape.geometry, dtype)
    harness.check(f"{shape}: samples", samples[few], right, TOLERANCES[dtype])
    harness.check(f"{shape}: squares", found[few], squares, TOLERANCES[dtype])
    norm = convolution_norm(gradient, input, *shape.geometry)
    harness.check(f"{shape}: norm", norm[few], squares, 1e-4)
    weights = weights * (torch.arange(len(weights), device=weights.device) < CHECKED_SAMPLES)
    total = convolution_weighted(gradient, input, weights, *shape.geometry)
    harness.check(f"{shape}: weighted", total, reference.weighted(right, weights[few]), 1e-4)


def measure(shape: Shape, times: int, dtype: torch.dtype, layout: str, device: str) -> dict:
    """Check and time one convolution."""
    gradient, input = (
        torch.randn(sizes, device=device).to(dtype, memory_format=LAYOUTS[layout])
        for sizes in (shape.gradient, shape.input)
    )
    weights = torch.rand(shape.gradient[0], device=device)
    check(gradient, input, weights, shape)

    def compiled(function: Callable, *arguments: Tensor) -> float:
        # Its memory is given back before the next is made.
        torch.compiler.reset()
        run = torch.compile(function, dynamic=False) if device == "cuda" else function
        return harness.median_ms(lambda: run(*arguments, shape))

    geometry = shape.geometry
    row = {
        "shape": str(shape),
        "times": times,
        "samples": harness.median_ms(
            lambda: convolution_samples(gradient, input, *geometry, dtype)
        ),
        "norm": harness.median_ms(lambda: convolution_norm(gradient, input, *geometry)),
        "weighted": harness.median_ms(
            lambda: convolution_weighted(gradient, input, weights, *geometry)
        ),
        "patches": compiled(patches, gradient, input),
        "scaled": compiled(scaled, gradient, input, weights),
        "cudnn": harness.median_ms(lambda: weight_gradient(gradient, input, shape)),
    }
    return row | {
        "norm_tflops": 1e-9 * shape.flops / row["norm"],
        "patches_ratio": row["patches"] / row["samples"],
        "scaled_ratio": row["scaled"] / row["weighted"],
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["wrn16-4-b512", "resnet50-b64"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--layouts", nargs="+", default=["channels_last"], choices=LAYOUTS)
    options = parser.parse_args()
    device = harness.device(options.smoke)
    if options.smoke:
        options.models = [tiny_name(model) for model in options.models]
    table = harness.Table(COLUMNS)
    for model in options.models:
        for dtype in options.dtypes:
            for layout in options.layouts:
                print(f"{model}, {dtype}, {layout}")
                rows = [
                    measure(shape, times, DTYPES[dtype], layout, device)
                    for shape, times in shapes_of(model).items()
                ]
                for row in rows:
                    table.add(**row, model=model, dtype=dtype, layout=layout)
                total = {
                    column: sum(row["times"] * row[column] for row in rows)
                    for column in ("samples", "norm", "weighted", "patches", "scaled", "cudnn")
                }
                table.add(shape="all", **total, model=model, dtype=dtype, layout=layout)
    table.write(options.output)


if __name__ == "__main__":
    main()
