"""Architectures of transformers, tiny and with random weights, trained with their own loss.

Dropout and layer-drop are 0. The batch is what a data collator gives: a dict with ``labels``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

VOCAB, HIDDEN, LENGTH, CLASSES, IMAGE = 64, 16, 6, 3, 16
SEED = 99

_COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# One layer, but where layers differ, or share something.
_TWO_LAYERS = {"num_hidden_layers": 2}
_DECODER = _COMMON | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
_ENCODER = _DECODER | {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": CLASSES,
}
_SEQUENCE = _COMMON | {
    "d_model": HIDDEN,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_VISION = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": CLASSES,
}


@dataclass(frozen=True)
class Architecture:
    """A model class, its tiny configuration and its kind of batch."""

    name: str
    model: str
    config: str
    options: dict[str, Any]
    batch: Callable[[int], dict[str, Tensor]]
    wrap: Callable[[nn.Module], nn.Module] = nn.Module.train

    def build_model(self) -> nn.Module:
        torch.manual_seed(SEED)
        config = getattr(hf, self.config)(**self.options)
        model = getattr(hf, self.model)(config)
        _randomise(model)
        return self.wrap(model)

    def build_batch(self, size: int = 3) -> dict[str, Tensor]:
        torch.manual_seed(SEED + 1)
        return self.batch(size)


def _randomise(model: nn.Module) -> None:
    """Move parameters off their initial values: zeros hide gradients, 0.02 makes them tiny."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator))


def causal_tokens(size: int) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (size, LENGTH))
    return {"input_ids": ids, "labels": ids.clone()}


def masked_tokens(size: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(3, VOCAB, (size, LENGTH)),
        "labels": torch.randint(3, VOCAB, (size, LENGTH)),
    }


def classified_tokens(size: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(3, VOCAB, (size, LENGTH)),
        "attention_mask": torch.ones(size, LENGTH, dtype=torch.long),
        "labels": torch.randint(CLASSES, (size,)),
    }


def sequence_pairs(size: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(3, VOCAB, (size, LENGTH)),
        "labels": torch.randint(3, VOCAB, (size, LENGTH - 1)),
    }


def images(size: int) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(size, 3, IMAGE, IMAGE),
        "labels": torch.randint(CLASSES, (size,)),
    }


def padded(batch: Callable[[int], dict[str, Tensor]], *, side: str = "right"):
    """Give every sample another length; padding is masked, and its labels are ignored."""

    def padded_batch(size: int) -> dict[str, Tensor]:
        inputs = batch(size)
        places = torch.arange(LENGTH)
        lengths = LENGTH - torch.arange(size)[:, None] % (LENGTH - 2)
        real = places < lengths if side == "right" else places >= LENGTH - lengths
        inputs["input_ids"] = inputs["input_ids"].masked_fill(~real, 0)
        inputs["attention_mask"] = real.long()
        labels = inputs["labels"]
        inputs["labels"] = labels.masked_fill(~real[:, : labels.shape[1]], -100)
        return inputs

    return padded_batch


def lora(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=2, lora_dropout=0.0, init_lora_weights=False,
                             target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def evaluated(model: nn.Module) -> nn.Module:
    """Leave training mode: there, layer-drop branches on a random number even if it is 0."""
    return model.eval()


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


_GPT2 = _COMMON | {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 32,
                   "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_T5 = _COMMON | {"d_model": HIDDEN, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
                 "dropout_rate": 0.0, "decoder_start_token_id": 0,
                 "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
_GROUPED = _DECODER | {"num_key_value_heads": 1, "head_dim": 8}

DECODERS = [
    Architecture("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2, causal_tokens),
    Architecture("gpt_neo", "GPTNeoForCausalLM", "GPTNeoConfig",
                 _COMMON | {"hidden_size": HIDDEN, "num_layers": 2, "num_heads": 2,
                            "attention_types": [[["global", "local"], 1]], "window_size": 4,
                            "intermediate_size": 24, "max_position_embeddings": 32,
                            "embed_dropout": 0.0, "attention_dropout": 0.0, "resid_dropout": 0.0},
                 causal_tokens),
    Architecture("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER, causal_tokens),
    Architecture("llama", "LlamaForCausalLM", "LlamaConfig",
                 _GROUPED | _TWO_LAYERS, causal_tokens),
    Architecture("mistral", "MistralForCausalLM", "MistralConfig",
                 _GROUPED | {"sliding_window": 4}, causal_tokens),
    Architecture("qwen2", "Qwen2ForCausalLM", "Qwen2Config",
                 _DECODER | {"num_key_value_heads": 1, "tie_word_embeddings": True}, causal_tokens),
    Architecture("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _GROUPED, causal_tokens),
    Architecture("gemma", "GemmaForCausalLM", "GemmaConfig", _GROUPED, causal_tokens),
    Architecture("gemma2", "Gemma2ForCausalLM", "Gemma2Config",
                 _GROUPED | _TWO_LAYERS | {"sliding_window": 4, "query_pre_attn_scalar": 8},
                 causal_tokens),
    Architecture("phi", "PhiForCausalLM", "PhiConfig",
                 _DECODER | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, causal_tokens),
    Architecture("opt", "OPTForCausalLM", "OPTConfig",
                 _COMMON | {"hidden_size": HIDDEN, "num_hidden_layers": 1, "ffn_dim": 24,
                            "num_attention_heads": 2, "max_position_embeddings": 32,
                            "word_embed_proj_dim": HIDDEN, "dropout": 0.0, "layerdrop": 0.0},
                 causal_tokens, evaluated),
    Architecture("bloom", "BloomForCausalLM", "BloomConfig",
                 _COMMON | {"hidden_size": HIDDEN, "n_layer": 1, "n_head": 2,
                            "hidden_dropout": 0.0, "attention_dropout": 0.0}, causal_tokens),
    Architecture("falcon", "FalconForCausalLM", "FalconConfig",
                 _COMMON | {"hidden_size": HIDDEN, "num_hidden_layers": 1,
                            "num_attention_heads": 2, "max_position_embeddings": 32,
                            "attention_dropout": 0.0, "hidden_dropout": 0.0}, causal_tokens),
    Architecture("stablelm", "StableLmForCausalLM", "StableLmConfig",
                 _DECODER | {"num_key_value_heads": 2}, causal_tokens),
    Architecture("olmo2", "Olmo2ForCausalLM", "Olmo2Config", _DECODER, causal_tokens),
    Architecture("mamba", "MambaForCausalLM", "MambaConfig",
                 _COMMON | {"hidden_size": HIDDEN, "num_hidden_layers": 1, "state_size": 4,
                            "expand": 2, "conv_kernel": 3, "time_step_rank": 2}, causal_tokens),
]

ENCODERS = [
    Architecture("bert_masked", "BertForMaskedLM", "BertConfig", _ENCODER, masked_tokens),
    Architecture("bert_classifier", "BertForSequenceClassification", "BertConfig", _ENCODER,
                 classified_tokens),
    Architecture("bert_token_classifier", "BertForTokenClassification", "BertConfig", _ENCODER,
                 lambda size: causal_tokens(size)
                 | {"labels": torch.randint(CLASSES, (size, LENGTH))}),
    Architecture("roberta", "RobertaForSequenceClassification", "RobertaConfig", _ENCODER,
                 classified_tokens),
    Architecture("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig",
                 _COMMON | {"dim": HIDDEN, "n_layers": 1, "n_heads": 2, "hidden_dim": 24,
                            "max_position_embeddings": 32, "dropout": 0.0,
                            "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
                            "num_labels": CLASSES},
                 classified_tokens),
    Architecture("electra", "ElectraForMaskedLM", "ElectraConfig",
                 _ENCODER | {"embedding_size": 12}, masked_tokens),
    Architecture("albert", "AlbertForMaskedLM", "AlbertConfig",
                 _ENCODER | _TWO_LAYERS | {"embedding_size": 12}, masked_tokens),
    Architecture("mpnet", "MPNetForSequenceClassification", "MPNetConfig",
                 _ENCODER | _TWO_LAYERS, classified_tokens),
    Architecture("modernbert", "ModernBertForMaskedLM", "ModernBertConfig",
                 _DECODER | _TWO_LAYERS
                 | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
                 masked_tokens),
]

ENCODER_DECODERS = [
    Architecture("t5", "T5ForConditionalGeneration", "T5Config", _T5, sequence_pairs),
    Architecture("t5_gated", "T5ForConditionalGeneration", "T5Config",
                 _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
                        "num_layers": 1},
                 sequence_pairs),
    Architecture("bart", "BartForConditionalGeneration", "BartConfig", _SEQUENCE, sequence_pairs,
                 evaluated),
    Architecture("marian", "MarianMTModel", "MarianConfig",
                 _SEQUENCE | {"decoder_vocab_size": VOCAB}, sequence_pairs, evaluated),
    Architecture("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", _SEQUENCE,
                 sequence_pairs, evaluated),
]

VISION = [
    Architecture("vit", "ViTForImageClassification", "ViTConfig", _VISION, images),
    Architecture("deit", "DeiTForImageClassification", "DeiTConfig", _VISION, images),
    Architecture("dinov2", "Dinov2ForImageClassification", "Dinov2Config",
                 _VISION | {"mlp_ratio": 2}, images),
    Architecture("beit", "BeitForImageClassification", "BeitConfig",
                 _VISION | {"use_relative_position_bias": True, "drop_path_rate": 0.0}, images),
    Architecture("swin", "SwinForImageClassification", "SwinConfig",
                 {"image_size": IMAGE, "patch_size": 2, "embed_dim": 8, "depths": [2, 1],
                  "num_heads": [2, 2], "window_size": 4, "num_labels": CLASSES,
                  "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
                  "drop_path_rate": 0.0}, images),
    Architecture("convnext", "ConvNextForImageClassification", "ConvNextConfig",
                 {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "patch_size": 2,
                  "drop_path_rate": 0.0, "num_labels": CLASSES}, images),
    Architecture("clip_vision", "CLIPForImageClassification", "CLIPConfig",
                 {"vision_config": _VISION | {"attention_dropout": 0.0},
                  "text_config": _DECODER, "num_labels": CLASSES}, images),
    Architecture("siglip_vision", "SiglipForImageClassification", "SiglipConfig",
                 {"vision_config": _VISION | {"attention_dropout": 0.0},
                  "text_config": _DECODER, "num_labels": CLASSES}, images),
]


def _named(architectures: list[Architecture], name: str) -> Architecture:
    return next(each for each in architectures if each.name == name)


_GPT2_MODEL, _LLAMA = _named(DECODERS, "gpt2"), _named(DECODERS, "llama")

VARIANTS = [
    replace(_LLAMA, name="llama_lora", wrap=lora),
    replace(_GPT2_MODEL, name="gpt2_lora", wrap=lora),
    replace(_LLAMA, name="llama_checkpointed", wrap=checkpointed),
    replace(_GPT2_MODEL, name="gpt2_padded", batch=padded(causal_tokens)),
    replace(_GPT2_MODEL, name="gpt2_padded_left", batch=padded(causal_tokens, side="left")),
    replace(_LLAMA, name="llama_padded", batch=padded(causal_tokens)),
    replace(_named(ENCODERS, "bert_masked"), name="bert_padded", batch=padded(masked_tokens)),
    replace(_named(ENCODER_DECODERS, "t5_gated"), name="t5_padded", batch=padded(sequence_pairs)),
    replace(_named(ENCODER_DECODERS, "bart"), name="bart_padded", batch=padded(sequence_pairs)),
]

ARCHITECTURES = {
    each.name: each for each in (*DECODERS, *ENCODERS, *ENCODER_DECODERS, *VISION, *VARIANTS)
}
