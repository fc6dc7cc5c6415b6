"""The workloads: a model, a batch and a loss each, found by name ("gpt2-t1024-b16").

A new workload is one function decorated with ``@workload``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNTIED = (
    "Opacus accepts neither the tied head nor the broadcast position embedding: it runs a variant "
    "with a head of its own and position ids repeated for every sample."
)


@dataclass(frozen=True)
class Workload:
    """A model and a batch; the loss is the mean cross-entropy of the logits.

    Attributes:
        name: what was asked for.
        description: one line for the table.
        batch_size: B.
        build: builds the model, on torch's default device.
        inputs: draws (inputs, targets), batch first, on torch's default device.
        build_for_opacus: the closest model that Opacus accepts, where that is another one.
        opacus_note: how it differs.
    """

    name: str
    description: str
    batch_size: int
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, Tensor]]
    build_for_opacus: Callable[[], nn.Module] | None = None
    opacus_note: str = ""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples, and over tokens where there are any."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


_builders: dict[str, tuple[Callable[..., Workload], dict[str, int]]] = {}


def workload(name: str, **defaults: int) -> Callable[[Callable[..., Workload]], Any]:
    """Register a builder; ``defaults`` are the sizes that the name may override (t, b)."""

    def register(builder: Callable[..., Workload]) -> Callable[..., Workload]:
        _builders[name] = (builder, defaults)
        return builder

    return register


def find_workload(name: str) -> Workload:
    """Build a workload from its name: a registered one, then sizes ("-t256", "-b64").

    Raises:
        ValueError: the name or a size is not known.
    """
    for base, (builder, defaults) in _builders.items():
        match = re.fullmatch(re.escape(base) + r"((?:-[a-z]\d+)*)", name)
        if match is None:
            continue
        sizes = {key: int(value) for key, value in re.findall(r"-([a-z])(\d+)", match[1])}
        if not sizes.keys() <= defaults.keys():
            raise ValueError(f"{base} takes the sizes {sorted(defaults)}, not {sorted(sizes)}")
        return builder(name, **(defaults | sizes))
    raise ValueError(f"no workload {name!r}; known: {', '.join(_builders)} (then -t256, -b64)")


# --- transformers, in plain PyTorch ---------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = (
            part.view(B, T, self.heads, d // self.heads).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).split(d, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(B, T, d))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2's architecture: learned positions, LayerNorm, GELU, a head tied to the embedding.

    ``for_opacus`` unties the head and repeats the position ids for every sample.
    """

    def __init__(
        self,
        vocab: int,
        context: int,
        width: int,
        layers: int,
        heads: int,
        *,
        for_opacus: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False) if for_opacus else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        if self.head is not None:
            positions = positions.repeat(len(ids), 1)
        x = self.tokens(ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return F.linear(x, self.tokens.weight) if self.head is None else self.head(x)


def next_token(vocab: int, batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    """Draw random token ids [B, T], and the same shifted by one as targets."""
    ids = torch.randint(vocab, (batch_size, length + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _language_model(name: str, description: str, t: int, b: int, **sizes: int) -> Workload:
    return Workload(
        name,
        f"{description}, T={t}, B={b}",
        b,
        build=lambda: GPT(**sizes),
        inputs=lambda: next_token(sizes["vocab"], b, t),
        build_for_opacus=lambda: GPT(**sizes, for_opacus=True),
        opacus_note=UNTIED,
    )


@workload("gpt2", t=1024, b=16)
def gpt2(name: str, t: int, b: int) -> Workload:
    sizes = {"vocab": 50257, "context": max(t, 1024), "width": 768, "layers": 12, "heads": 12}
    return _language_model(name, "GPT-2 small (124M, tied head)", t, b, **sizes)


@workload("d2048", t=512, b=16)
def d2048(name: str, t: int, b: int) -> Workload:
    sizes = {"vocab": 32000, "context": max(t, 1024), "width": 2048, "layers": 12, "heads": 16}
    description = "decoder, d=2048, 12 layers, 16 heads, vocabulary 32000 (672M, tied head)"
    return _language_model(name, description, t, b, **sizes)


@workload("tiny", t=16, b=4)
def tiny(name: str, t: int, b: int) -> Workload:
    sizes = {"vocab": 97, "context": max(t, 32), "width": 32, "layers": 2, "heads": 2}
    return _language_model(name, "smoke-test GPT, d=32, 2 layers", t, b, **sizes)


# --- models of other libraries, built from their configuration with random weights ----------------


class Logits(nn.Module):
    """A transformers model that takes one tensor and returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


@workload("bert", t=512, b=32)
def bert(name: str, t: int, b: int) -> Workload:
    def build() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2)
        return Logits(BertForSequenceClassification(config))

    return Workload(
        name,
        f"BERT-base classification (transformers), T={t}, B={b}, no dropout",
        b,
        build,
        inputs=lambda: (torch.randint(30522, (b, t)), torch.randint(2, (b,))),
    )


@workload("vit", b=64)
def vit(name: str, b: int) -> Workload:
    def build() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        return Logits(ViTForImageClassification(ViTConfig(num_labels=1000)))

    description = f"ViT-B/16 (transformers), 224x224, B={b}"
    return Workload(name, description, b, build, _images(b, 224, 1000))


@workload("llama-lora", t=512, b=16)
def llama_lora(name: str, t: int, b: int) -> Workload:
    def build() -> nn.Module:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=4,
            use_cache=False,
        )
        lora = LoraConfig(r=16, lora_alpha=32, init_lora_weights=False, target_modules="all-linear")
        return Logits(get_peft_model(LlamaForCausalLM(config), lora))

    description = "Llama d=2048, 16 layers, LoRA r=16 on all linear layers (random adapters)"
    return Workload(name, f"{description}, T={t}, B={b}", b, build, lambda: next_token(32000, b, t))


@workload("resnet50", b=64)
def resnet50(name: str, b: int) -> Workload:
    from convnets import ResNet50

    return Workload(
        name, f"ResNet-50 with GroupNorm, 224x224, B={b}", b, ResNet50, _images(b, 224, 1000)
    )


@workload("wrn16-4", b=256)
def wrn16_4(name: str, b: int) -> Workload:
    from convnets import WideResNet

    return Workload(
        name, f"WRN-16-4 with GroupNorm, 32x32, B={b}", b, WideResNet, _images(b, 32, 10)
    )


def _images(b: int, size: int, classes: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(b, 3, size, size), torch.randint(classes, (b,)))
