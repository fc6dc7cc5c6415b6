"""Architectures of transformers, trained with their own loss, against the oracle."""

from __future__ import annotations

import pytest
import torch
from driver import (
    bound_that_clips_some,
    call,
    clip,
    model_oracle,
    private_step,
    read_result,
)
from oracle import assert_matches_oracle
from zoo_transformers import ARCHITECTURES

import flashnorm_compile as fn

#: Where strategies differ most: tied heads, shared layers, scans, class tokens, LoRA. At these
#: sizes "auto" materializes all but some embeddings.
WITH_GHOST_NORMS = ("gpt2", "albert", "mamba", "vit", "llama_lora")


def own_loss(model, **batch):
    return model(**batch).loss


def check_architecture(name: str, strategy: str, lowering: str = "eager") -> None:
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build_model(), architecture.build_batch()
    per_sample = model_oracle(model, own_loss, batch)
    bound = bound_that_clips_some(per_sample.norms)
    plain = own_loss(model, **batch).detach()
    step = private_step(own_loss, max_grad_norm=bound, strategy=strategy, lowering=lowering)
    result = read_result(step, model, call(step, model, batch))
    assert_matches_oracle(
        clip(per_sample, bound, "mean"),
        norms=result.norms,
        factors=result.factors,
        grads=result.grads,
    )
    torch.testing.assert_close(result.loss, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matches_oracle(name):
    check_architecture(name, "auto")


@pytest.mark.parametrize("name", WITH_GHOST_NORMS)
def test_matches_oracle_with_ghost_norms(name):
    check_architecture(name, "ghost")


@pytest.mark.inductor
@pytest.mark.parametrize("name", ["gpt2_padded", "vit"])
def test_matches_oracle_with_inductor(name):
    check_architecture(name, "auto", lowering="inductor")


def test_adapters_move_and_the_base_does_not():
    """LoRA trains: the adapters have gradients, and nothing else has."""
    architecture = ARCHITECTURES["llama_lora"]
    model, batch = architecture.build_model(), architecture.build_batch()
    step = private_step(own_loss)
    call(step, model, batch)
    for name, param in model.named_parameters():
        if "lora_" in name:
            assert param.grad is not None, name
            assert param.grad.abs().sum() > 0, name
        else:
            assert param.grad is None, name


def test_other_lengths_and_batch_sizes():
    """One private step for batches of several shapes, as a data loader gives them."""
    architecture = ARCHITECTURES["gpt2_padded"]
    model, step = architecture.build_model(), private_step(own_loss, max_grad_norm=2.0)
    for size, length in ((3, 6), (4, 6), (2, 5)):
        batch = {key: value[:, :length] for key, value in architecture.build_batch(size).items()}
        expected = clip(model_oracle(model, own_loss, batch), 2.0, "mean")
        model.zero_grad()
        result = read_result(step, model, call(step, model, batch))
        assert_matches_oracle(expected, norms=result.norms, factors=result.factors,
                              grads=result.grads)


@pytest.mark.parametrize("name", ["gpt2", "bert_masked"])
def test_tokens_of_other_samples_do_not_matter(name):
    """A sample's norm does not change with how many labels the other samples ignore."""
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build_model(), architecture.build_batch()
    step, norms = private_step(own_loss), []
    for ignored in (0, 3):
        batch["labels"][1:, 2 : 2 + ignored] = -100
        call(step, model, batch)
        norms.append(step.per_sample_norms[0])
        model.zero_grad()
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["opt", "bart"])
def test_layer_drop_is_refused_as_a_graph_break(name):
    """In training mode layer-drop branches on a random number, which splits the forward."""
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build_model().train(), architecture.build_batch()
    with pytest.raises(fn.PrivacyError) as caught:
        call(private_step(own_loss), model, batch)
    assert all(param.grad is None for param in model.parameters())
    assert "graph break" in str(caught.value)
    assert "layerdrop" in str(caught.value)
