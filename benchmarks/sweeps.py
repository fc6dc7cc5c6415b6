"""Sets of workloads beside the ones that are compared by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models import tiny_name


@dataclass(frozen=True)
class Sweep:
    """One size that grows.

    Attributes:
        title: of the figure.
        label: of the axis.
        workloads: by the size's value.
        smoke: the same, tiny.
    """

    title: str
    label: str
    workloads: Mapping[int, str]
    smoke: Mapping[int, str]

    def points(self, *, smoke: bool) -> Mapping[int, str]:
        return self.smoke if smoke else self.workloads


_TOKENS = 16384

SWEEPS = {
    "t": Sweep(
        "GPT-2 small, 16384 tokens a step",
        "tokens in a sample, T (the batch shrinks: B = 16384 / T)",
        {t: f"gpt2-t{t}-b{_TOKENS // t}" for t in (128, 256, 1024, 4096, 16384)},
        {t: f"tiny-gpt2-t{t}-b{64 // t}" for t in (4, 8, 16)},
    ),
    "b": Sweep(
        "GPT-2 small, T = 256",
        "samples in a batch, B",
        {b: f"gpt2-t256-b{b}" for b in (4, 16, 32, 64, 128)},
        {b: f"tiny-gpt2-t8-b{b}" for b in (3, 6, 12)},
    ),
    "d": Sweep(
        "decoder of 4 layers, T = 512, B = 16",
        "width, d",
        {d: f"decoder-d{d}-t512-b16" for d in (256, 512, 1024, 2048, 4096)},
        {d: f"tiny-decoder-d{d}-t8-b4" for d in (32, 64, 128)},
    ),
}
SWEEP_METHODS = (
    "compiled", "flashnorm-auto", "flashnorm-auto-library", "flashnorm-materialize",
    "flashnorm-ghost", "flashnorm-flash", "opacus-ghost", "opacus-hooks",
)  # fmt: skip

#: A batch whose per-sample gradients need far more memory than all else, and a model that every
#: method takes as it is.
CLASSIC_WORKLOAD = "gpt2-untied-t128-b64"
#: What the classic comparison calls them, and methods that stand for them, best first.
CLASSIC_ROWS: Mapping[str, tuple[str, ...]] = {
    "standard DP-SGD": ("opacus-hooks", "vmap-eager"),
    "ghost": ("flashnorm-ghost-library",),
    "flash": ("flashnorm-flash",),
    "flash + fused": ("flashnorm-auto",),
}


def classic_workload(*, smoke: bool) -> str:
    return tiny_name(CLASSIC_WORKLOAD) if smoke else CLASSIC_WORKLOAD
