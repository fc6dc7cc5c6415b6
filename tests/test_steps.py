"""The ways in which a step can be written, called and compiled."""

from __future__ import annotations

import pytest
import torch
from driver import (
    EXPECTED_BATCH_SIZE,
    bound_that_clips_some,
    call,
    clip,
    gradients_of,
    model_oracle,
    read_result,
)
from oracle import OracleResult, assert_matches_oracle, per_sample_oracle
from torch import nn
from torch.nn import functional as F
from zoo_dense import mlp

import flashnorm_compile as fn

C = 0.4
OPTIONS = {
    "max_grad_norm": C,
    "noise_multiplier": 0.0,
    "expected_batch_size": EXPECTED_BATCH_SIZE,
    "lowering": "eager",
}


def xy(size: int = 4):
    return torch.randn(size, 6), torch.randint(3, (size,))


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


def expect(model, loss, batch, **options) -> OracleResult:
    return clip(model_oracle(model, loss, batch, **options), C, "mean")


def check(step, model, result, expected: OracleResult) -> None:
    got = read_result(step, model, result)
    assert_matches_oracle(expected, norms=got.norms, factors=got.factors, grads=got.grads)


def test_backend_by_name():
    model, (x, y) = mlp(), xy()

    def step(model, x, y):
        loss = cross_entropy(model, x, y)
        loss.backward()
        return loss.detach()

    torch.compile(step, backend="flashnorm", options=OPTIONS)(model, x, y)
    assert_matches_oracle(expect(model, cross_entropy, (x, y)), norms=None, factors=None,
                          grads=gradients_of(model))


def test_backend_on_a_loss_with_backward_outside():
    model, (x, y) = mlp(), xy()
    loss_of = torch.compile(cross_entropy, backend="flashnorm", options=OPTIONS)
    loss_of(model, x, y).backward()
    assert_matches_oracle(expect(model, cross_entropy, (x, y)), norms=None, factors=None,
                          grads=gradients_of(model))


def test_model_from_a_closure():
    model, (x, y) = mlp(), xy()

    @fn.dp_step(**OPTIONS)
    def step(x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    check(step, model, step(x, y), expect(model, cross_entropy, (x, y)))


def test_method_of_a_trainer():
    class Trainer:
        def __init__(self):
            self.model = mlp()

        def step(self, x, y):
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            return loss.detach()

    trainer, (x, y) = Trainer(), xy()
    step = fn.dp_step(**OPTIONS)(trainer.step)
    check(step, trainer.model, step(x, y), expect(trainer.model, cross_entropy, (x, y)))


def test_parameters_as_arguments():
    """Functional style: no module at all."""
    weight, bias = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(3))
    x, y = xy()

    @fn.dp_step(**OPTIONS)
    def step(weight, bias, x, y):
        loss = F.cross_entropy(F.linear(x, weight, bias), y)
        loss.backward()
        return loss.detach()

    expected = per_sample_oracle(
        lambda batch: F.cross_entropy(F.linear(batch[0], weight, bias), batch[1]),
        {"weight": weight, "bias": bias},
        (x, y),
        max_grad_norm=C,
        expected_batch_size=EXPECTED_BATCH_SIZE,
        loss_reduction="mean",
    )
    step(weight, bias, x, y)
    assert_matches_oracle(
        expected,
        norms=step.per_sample_norms,
        factors=step.clipping_factors,
        grads={"weight": weight.grad, "bias": bias.grad},
    )


def test_parameters_in_a_dict():
    params = {"weight": nn.Parameter(torch.randn(3, 6)), "scale": nn.Parameter(torch.tensor(1.5))}
    x, y = xy()

    def loss_of(params, x, y):
        return F.cross_entropy(params["scale"] * (x @ params["weight"].T), y)

    @fn.dp_step(**OPTIONS)
    def step(params, x, y):
        loss = loss_of(params, x, y)
        loss.backward()
        return loss.detach()

    expected = per_sample_oracle(
        lambda batch: loss_of(params, *batch), params, (x, y), max_grad_norm=C,
        expected_batch_size=EXPECTED_BATCH_SIZE, loss_reduction="mean",
    )
    step(params, x, y)
    assert_matches_oracle(expected, norms=step.per_sample_norms, factors=step.clipping_factors,
                          grads={name: param.grad for name, param in params.items()})


def test_two_models():
    encoder, decoder = nn.Linear(6, 4), nn.Linear(4, 3)
    both, (x, y) = nn.ModuleList([encoder, decoder]), xy()

    @fn.dp_step(**OPTIONS)
    def step(encoder, decoder, x, y):
        loss = F.cross_entropy(decoder(encoder(x).tanh()), y)
        loss.backward()
        return loss.detach()

    def loss_of(both, x, y):
        return F.cross_entropy(both[1](both[0](x).tanh()), y)

    check(step, both, step(encoder, decoder, x, y), expect(both, loss_of, (x, y)))


@pytest.mark.parametrize("in_dims", [
    (None, 1, 0),
    {"x": 1, "y": 0},
    {"x": 1},
], ids=["tuple", "dict", "dict_with_default"])
def test_in_dims(in_dims):
    model = mlp()
    x, y = torch.randn(5, 4, 6), torch.randint(3, (4,))

    def loss_of(model, x, y):
        return F.cross_entropy(model(x).mean(0), y)

    @fn.dp_step(**OPTIONS, in_dims=in_dims)
    def step(model, x, y):
        loss = F.cross_entropy(model(x).mean(0), y)
        loss.backward()
        return loss.detach()

    check(step, model, step(model, x, y), expect(model, loss_of, (x, y), in_dims=(1, 0)))


def test_in_dims_of_one_number():
    model, x = mlp(), torch.randn(5, 4, 6)

    @fn.dp_step(**OPTIONS, in_dims=1)
    def step(model, x):
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    expected = expect(model, lambda m, x: m(x).square().mean(), (x,), in_dims=(1,))
    check(step, model, step(model, x), expected)


def test_in_dims_nested_negative_and_none():
    model = mlp()
    batch = {"x": torch.randn(6, 4), "offset": torch.randn(6), "parts": [torch.randn(4, 3)]}
    dims = {"x": -1, "offset": None, "parts": [0]}

    def loss_of(model, batch):
        return F.mse_loss(model(batch["x"].T + batch["offset"]), batch["parts"][0])

    @fn.dp_step(**OPTIONS, in_dims={"batch": dims})
    def step(model, batch):
        loss = loss_of(model, batch)
        loss.backward()
        return loss.detach()

    expected = expect(model, lambda m, **b: loss_of(m, b), batch, in_dims=dims | {"x": 1})
    check(step, model, step(model, batch), expected)


def test_keyword_only_arguments():
    model, (x, y) = mlp(), xy()

    @fn.dp_step(**OPTIONS)
    def step(*, model, x, y, temperature: float = 1.0):
        loss = F.cross_entropy(model(x) / temperature, y)
        loss.backward()
        return loss.detach()

    def loss_of(model, x, y):
        return F.cross_entropy(model(x) / 2.0, y)

    result = step(model=model, x=x, y=y, temperature=2.0)
    check(step, model, result, expect(model, loss_of, (x, y)))


def test_several_values_returned():
    """What the step returns is what the plain step returns."""
    model, (x, y) = mlp(), xy()

    @fn.dp_step(**OPTIONS)
    def step(model, x, y):
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        accuracy = (logits.argmax(-1) == y).float().mean()
        return {"loss": loss.detach(), "logits": logits.detach(), "accuracy": accuracy}

    out = step(model, x, y)
    logits = model(x).detach()
    torch.testing.assert_close(out["logits"], logits)
    torch.testing.assert_close(out["loss"], F.cross_entropy(logits, y))
    torch.testing.assert_close(out["accuracy"], (logits.argmax(-1) == y).float().mean())
    check(step, model, out, expect(model, cross_entropy, (x, y)))


def test_loss_item_after_backward():
    model, (x, y) = mlp(), xy()

    @fn.dp_step(**OPTIONS)
    def step(model, x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    result = step(model, x, y)
    assert result == pytest.approx(cross_entropy(model, x, y).item(), rel=1e-5)
    check(step, model, result, expect(model, cross_entropy, (x, y)))


@pytest.mark.parametrize("make", [
    lambda params: torch.optim.SGD(params, lr=0.5),
    lambda params: torch.optim.AdamW(params, lr=0.1),
], ids=["sgd", "adamw"])
def test_optimizer_inside_the_step(make):
    """zero_grad, backward and optimizer.step in one function, for three steps."""
    model, reference = mlp(), mlp()
    reference.load_state_dict(model.state_dict())
    optimizer, plain = make(model.parameters()), make(reference.parameters())

    @fn.dp_step(**OPTIONS)
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    for size in (4, 4, 4):
        x, y = xy(size)
        expected = expect(reference, cross_entropy, (x, y))
        step(model, optimizer, x, y)
        for name, param in reference.named_parameters():
            param.grad = expected.grads[name].float()
        plain.step()
    for got, want in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gradients_add_up_over_calls():
    """Two calls without zero_grad add their clipped gradients, as ordinary backward calls do."""
    model, first, second = mlp(), xy(), xy()

    @fn.dp_step(**OPTIONS)
    def step(model, x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    wanted = [expect(model, cross_entropy, batch) for batch in (first, second)]
    step(model, *first)
    step(model, *second)
    total = {name: wanted[0].grads[name] + wanted[1].grads[name] for name in wanted[0].grads}
    assert_matches_oracle(OracleResult(wanted[1].norms, wanted[1].factors, total),
                          norms=step.per_sample_norms, factors=step.clipping_factors,
                          grads=gradients_of(model))


def test_parameters_change_between_steps():
    """Nothing stale: norms follow the weights (and a layer frozen later has no gradient)."""
    model, (x, y) = mlp(), xy()

    @fn.dp_step(**OPTIONS)
    def step(model, x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    step(model, x, y)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.7)
    model.zero_grad()
    check(step, model, step(model, x, y), expect(model, cross_entropy, (x, y)))
    model[0].requires_grad_(False)
    model.zero_grad()
    check(step, model, step(model, x, y), expect(model, cross_entropy, (x, y)))


def test_layer_skipped_in_a_later_step():
    """A layer that takes no part leaves no stale norm behind."""
    model, (x, y) = mlp(), xy()
    extra = nn.Linear(6, 6)
    both = nn.ModuleList([model, extra])

    @fn.dp_step(**OPTIONS)
    def step(both, x, y, use_extra: bool):
        hidden = both[1](x) if use_extra else x
        loss = F.cross_entropy(both[0](hidden), y)
        loss.backward()
        return loss.detach()

    for use_extra in (True, False, True):
        both.zero_grad()

        def loss_of(both, x, y, used=use_extra):
            return F.cross_entropy(both[0](both[1](x) if used else x), y)

        result = step(both, x, y, use_extra)
        check(step, both, result, expect(both, loss_of, (x, y)))


def test_train_and_eval_mode_of_one_model():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    x, y = xy()

    @fn.dp_step(**OPTIONS)
    def step(model, x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    check(step, model, step(model, x, y), expect(model, cross_entropy, (x, y)))


def test_bound_chosen_from_the_norms_clips_some_samples():
    """The oracle's own check: clipping happens for some samples and not for others."""
    model, batch = mlp(), xy()
    gradients = model_oracle(model, cross_entropy, batch)
    bound = bound_that_clips_some(gradients.norms)
    factors = clip(gradients, bound, "mean").factors
    assert (factors == 1).any()
    assert (factors < 1).any()
    plain = call(cross_entropy, model, batch)
    plain.backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(gradients.by_name[name].mean(0).float(), param.grad)
