"""Models of transformers and peft, built from their configuration with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class BertClassifier(nn.Module):
    """BERT-base with a head for two classes, without dropout.

    ``repeat_positions`` passes position ids [B, T] in place of the model's own [1, T].
    """

    def __init__(self, *, tiny: bool = False, repeat_positions: bool = False) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        sizes: dict[str, Any] = {}
        if tiny:
            sizes = {
                "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32,
            }  # fmt: skip
        config = BertConfig(
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2, **sizes
        )
        self.repeat_positions = repeat_positions
        self.model = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        if not self.repeat_positions:
            return self.model(ids).logits
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        types = torch.zeros_like(ids)
        return self.model(ids, position_ids=positions, token_type_ids=types).logits


class ViT(nn.Module):
    """ViT-B/16 for 1000 classes, without dropout."""

    def __init__(self, *, tiny: bool = False) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        sizes: dict[str, Any] = {"num_labels": 1000}
        if tiny:
            sizes = {
                "num_labels": 10, "image_size": 16, "patch_size": 4, "hidden_size": 32,
                "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
            }  # fmt: skip
        self.model = ViTForImageClassification(ViTConfig(**sizes))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).logits


class LlamaLora(nn.Module):
    """A Llama-style model of 1.1B parameters; only adapters are trained.

    The adapters are random: as they are usually initialised, half of their gradients are zero in
    the first step, which would make for a weak check.
    """

    def __init__(self, *, tiny: bool = False) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {
            "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        }  # fmt: skip
        if tiny:
            sizes = {
                "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            }  # fmt: skip
        config = LlamaConfig(use_cache=False, **sizes)
        lora = LoraConfig(r=16, lora_alpha=32, init_lora_weights=False, target_modules="all-linear")
        self.model = get_peft_model(LlamaForCausalLM(config), lora)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits
