"""The workloads: a model, a batch and a loss each, found by name ("gpt2-t1024-b16").

A new workload is one function decorated with ``@workload``. Every one has a tiny variant, by the
prefix "tiny-", in which each kind of layer is still there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpt import GPT
from torch import Tensor, nn

#: All that is compared by default.
WORKLOADS = (
    "gpt2-t1024-b16", "gpt2-t256-b64", "d2048-t512-b16", "llama-lora", "bert", "vit",
    "resnet50", "wrn16-4", "gpt2-t4096-b4", "gpt2-t16384-b1",
)  # fmt: skip

UNTIED = (
    "Opacus accepts neither the tied head nor the broadcast position embedding: it runs a variant "
    "with a head of its own and position ids repeated for every sample."
)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model and a batch; the loss is the mean cross-entropy of the logits.

    Attributes:
        name: what was asked for.
        description: one line for the table.
        batch_size: B.
        build: builds the model, on torch's default device.
        inputs: draws (inputs, targets) of so many samples, batch first, on torch's default device.
        build_for_opacus: the closest model that Opacus accepts, where that is another one.
        opacus_note: how it differs.
    """

    name: str
    description: str
    batch_size: int
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Batch]
    build_for_opacus: Callable[[], nn.Module] | None = None
    opacus_note: str = ""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples, and over tokens where there are any."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


_builders: dict[str, tuple[Callable[..., Workload], Mapping[str, int], Mapping[str, int]]] = {}


def workload(
    name: str, sizes: Mapping[str, int], tiny: Mapping[str, int]
) -> Callable[[Callable[..., Workload]], Any]:
    """Register a builder; ``sizes`` are those that the name may override (t, b, d)."""

    def register(builder: Callable[..., Workload]) -> Callable[..., Workload]:
        _builders[name] = (builder, sizes, tiny)
        return builder

    return register


def find_workload(name: str) -> Workload:
    """Build a workload from its name: "tiny-" or not, a registered one, sizes ("-t256", "-b64").

    Raises:
        ValueError: the name or a size is not known.
    """
    prefix, base, text = _parts(name)
    builder, defaults, tiny_defaults = _builders[base]
    sizes = {key: int(value) for key, value in re.findall(r"-([a-z])(\d+)", text)}
    if not sizes.keys() <= defaults.keys():
        raise ValueError(f"{base} takes the sizes {sorted(defaults)}, not {sorted(sizes)}")
    tiny = bool(prefix)
    return builder(name, tiny=tiny, **((tiny_defaults if tiny else defaults) | sizes))


def tiny_name(name: str) -> str:
    """Return the name of a workload's tiny variant, in the sizes that suit it."""
    return f"tiny-{_parts(name)[1]}"


def _parts(name: str) -> tuple[str, str, str]:
    for base in _builders:
        match = re.fullmatch(rf"(tiny-)?{re.escape(base)}((?:-[a-z]\d+)*)", name)
        if match is not None:
            return match[1] or "", base, match[2]
    raise ValueError(
        f"no workload {name!r}; known: {', '.join(_builders)} (then -t256, -b64; tiny- before)"
    )


def next_token(vocab: int, length: int) -> Callable[[int], Batch]:
    """Random token ids [B, T], and the same shifted by one as targets."""

    def draw(batch_size: int) -> Batch:
        ids = torch.randint(vocab, (batch_size, length + 1))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return draw


def images(size: int, classes: int) -> Callable[[int], Batch]:
    """Random images [B, 3, size, size], and classes [B]."""
    return lambda b: (torch.randn(b, 3, size, size), torch.randint(classes, (b,)))


# --- transformers, in plain PyTorch ---------------------------------------------------------------


def _decoder(name: str, description: str, t: int, b: int, **sizes: int) -> Workload:
    sizes["context"] = max(t, sizes["context"])
    return Workload(
        name,
        f"{description}, T={t}, B={b}",
        b,
        build=lambda: GPT(**sizes),
        inputs=next_token(sizes["vocab"], t),
        build_for_opacus=lambda: GPT(**sizes, untied=True),
        opacus_note=UNTIED,
    )


_GPT2 = {"vocab": 50257, "context": 1024, "width": 768, "layers": 12, "heads": 12}
_TINY_GPT2 = {"vocab": 97, "context": 32, "width": 32, "layers": 2, "heads": 2}


@workload("gpt2", {"t": 1024, "b": 16}, tiny={"t": 16, "b": 4})
def gpt2(name: str, *, tiny: bool, t: int, b: int) -> Workload:
    description = "tiny GPT (tied head)" if tiny else "GPT-2 small (124M, tied head)"
    return _decoder(name, description, t, b, **(_TINY_GPT2 if tiny else _GPT2))


@workload("gpt2-untied", {"t": 128, "b": 64}, tiny={"t": 4, "b": 8})
def gpt2_untied(name: str, *, tiny: bool, t: int, b: int) -> Workload:
    """The same model for every method, Opacus too."""
    sizes = _TINY_GPT2 if tiny else _GPT2
    size = "tiny GPT" if tiny else "GPT-2 small with a head of its own (163M)"
    return Workload(
        name, f"{size}, T={t}, B={b}", b, lambda: GPT(**sizes, untied=True),
        next_token(sizes["vocab"], t),
    )  # fmt: skip


@workload("d2048", {"t": 512, "b": 16}, tiny={"t": 12, "b": 5})
def d2048(name: str, *, tiny: bool, t: int, b: int) -> Workload:
    sizes = {"vocab": 32000, "context": 1024, "width": 2048, "layers": 12, "heads": 16}
    description = "decoder, d=2048, 12 layers, 16 heads, vocabulary 32000 (672M, tied head)"
    if tiny:
        sizes = {"vocab": 61, "context": 32, "width": 64, "layers": 3, "heads": 4}
        description = "tiny decoder, d=64 (tied head)"
    return _decoder(name, description, t, b, **sizes)


@workload("decoder", {"d": 1024, "t": 512, "b": 16}, tiny={"d": 64, "t": 8, "b": 4})
def decoder(name: str, *, tiny: bool, d: int, t: int, b: int) -> Workload:
    """For costs against the width: few layers, and a vocabulary that does not hide them."""
    sizes = {"vocab": 8192, "context": 1024, "width": d, "layers": 4, "heads": max(1, d // 64)}
    if tiny:
        sizes |= {"vocab": 53, "context": 32, "layers": 1}
    description = f"decoder, d={d}, {sizes['layers']} layers, vocabulary {sizes['vocab']}"
    return _decoder(name, description, t, b, **sizes)


# --- models of other libraries --------------------------------------------------------------------


@workload("bert", {"t": 128, "b": 256}, tiny={"t": 10, "b": 6})
def bert(name: str, *, tiny: bool, t: int, b: int) -> Workload:
    from library_models import BertClassifier

    vocab = 97 if tiny else 30522
    return Workload(
        name,
        f"{'tiny BERT' if tiny else 'BERT-base'} classification (transformers), T={t}, B={b}, "
        "no dropout",
        b,
        lambda: BertClassifier(tiny=tiny),
        inputs=lambda b: (torch.randint(vocab, (b, t)), torch.randint(2, (b,))),
        build_for_opacus=lambda: BertClassifier(tiny=tiny, repeat_positions=True),
        opacus_note="Opacus gets position ids repeated for every sample.",
    )


@workload("vit", {"b": 128}, tiny={"b": 5})
def vit(name: str, *, tiny: bool, b: int) -> Workload:
    from library_models import ViT

    description, draw = f"ViT-B/16 (transformers), 224x224, B={b}", images(224, 1000)
    if tiny:
        description, draw = f"tiny ViT (transformers), 16x16, B={b}", images(16, 10)
    return Workload(name, description, b, lambda: ViT(tiny=tiny), draw)


@workload("llama-lora", {"t": 1024, "b": 8}, tiny={"t": 12, "b": 4})
def llama_lora(name: str, *, tiny: bool, t: int, b: int) -> Workload:
    from library_models import LlamaLora

    size = "tiny Llama" if tiny else "Llama, d=2048, 22 layers, vocabulary 32000 (1.1B)"
    description = f"{size}, LoRA r=16 on all linear layers (peft, random adapters), T={t}, B={b}"
    draw = next_token(61 if tiny else 32000, t)
    return Workload(name, description, b, lambda: LlamaLora(tiny=tiny), draw)


# --- convolutional networks -----------------------------------------------------------------------


@workload("resnet50", {"b": 64}, tiny={"b": 5})
def resnet50(name: str, *, tiny: bool, b: int) -> Workload:
    from convnets import ResNet

    description, draw = f"ResNet-50 with GroupNorm, 224x224, B={b}", images(224, 1000)
    sizes: dict[str, Any] = {"depths": (3, 4, 6, 3), "width": 64, "classes": 1000}
    if tiny:
        description, draw = f"tiny bottleneck ResNet with GroupNorm, 32x32, B={b}", images(32, 10)
        sizes = {"depths": (1, 2), "width": 32, "classes": 10}
    return Workload(name, description, b, lambda: ResNet(**sizes), draw)


@workload("wrn16-4", {"b": 512}, tiny={"b": 6})
def wrn16_4(name: str, *, tiny: bool, b: int) -> Workload:
    from convnets import WideResNet

    description, widths = f"WRN-16-4 with GroupNorm, 32x32, B={b}", (64, 128, 256)
    if tiny:
        description, widths = f"tiny wide ResNet with GroupNorm, 8x8, B={b}", (32, 48)
    draw = images(8 if tiny else 32, 10)
    return Workload(name, description, b, lambda: WideResNet(widths), draw)
