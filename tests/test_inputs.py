"""What an input of a step is: a parameter, a constant or a batch, by where it comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from driver import EXPECTED_BATCH_SIZE, bound_that_clips_some, clip, model_oracle, read_result
from oracle import assert_matches_oracle
from torch import nn
from torch.nn import functional as F
from zoo_dense import mlp

import flashnorm_compile as fn

OPTIONS = {
    "max_grad_norm": 1.0,
    "noise_multiplier": 0.0,
    "expected_batch_size": EXPECTED_BATCH_SIZE,
    "lowering": "eager",
}


def private(function, **options):
    return fn.dp_step(**OPTIONS | options)(function)


def refused(step, *args) -> str:
    with pytest.raises(fn.PrivacyError) as caught:
        step(*args)
    return str(caught.value)


def accepted(step, model, loss, args, samples) -> None:
    """Run a step; it must give the gradients of the loss over ``samples``."""
    gradients = model_oracle(model, loss, samples)
    step.max_grad_norm = bound_that_clips_some(gradients.norms)
    result = read_result(step, model, step(model, *args))
    assert_matches_oracle(clip(gradients, step.max_grad_norm, "mean"), norms=result.norms,
                          factors=result.factors, grads=result.grads)


class Centred(nn.Module):
    """Subtracts the mean of a tensor that it holds, in one way or another."""

    def __init__(self, **attributes):
        super().__init__()
        self.inner = nn.Linear(6, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.inner(x - self.reference.mean(0))


def centred_loss(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


# --- NumPy


def test_array_of_samples_that_mixes():
    def step(model, x, array):
        loss = model(x - torch.from_numpy(array).mean(0)).square().mean()
        loss.backward()

    x = torch.randn(4, 6)
    text = refused(private(step), mlp(), x, x.numpy().copy())
    assert "averages over the batch axis" in text


@pytest.mark.parametrize("ignored", [1, 2])
def test_array_of_labels(ignored):
    """Each sample counts its own labels, whatever the others' are."""
    model, x, y = mlp(), torch.randn(6, 6), torch.randint(3, (6,))
    y[:ignored] = -100

    def loss_of(model, x, y):
        return F.cross_entropy(model(x), y, ignore_index=-100, reduction="none").mean()

    def step(model, x, array):
        loss = loss_of(model, x, torch.from_numpy(array))
        loss.backward()
        return loss.detach()

    accepted(private(step), model, loss_of, (x, y.numpy()), (x, y))


def test_array_in_a_dict():
    def step(model, batch):
        loss = model(batch["x"] - torch.from_numpy(batch["other"]).mean(0)).square().mean()
        loss.backward()

    batch = {"x": torch.randn(4, 6), "other": np.ones((4, 6), np.float32)}
    assert "averages over the batch axis" in refused(private(step), mlp(), batch)


def test_array_from_a_closure():
    array = np.ones((4, 6), np.float32)

    def step(model, x):
        loss = model(x - torch.from_numpy(array).mean(0)).square().mean()
        loss.backward()

    text = refused(private(step), mlp(), torch.randn(4, 6))
    assert "array reaches step from a closure" in text
    assert "in_dims={'array': None}" in text


def test_array_of_a_module():
    model = Centred()
    model.array = np.ones((4, 6), np.float32)

    def step(model, x):
        loss = model.inner(x - torch.from_numpy(model.array).mean(0)).square().mean()
        loss.backward()

    assert "model.array" in refused(private(step), model, torch.randn(4, 6))


def test_array_declared_as_a_constant():
    model, x = mlp(), torch.randn(4, 6)
    weight = np.linspace(0.5, 2, 3, dtype=np.float32)

    def step(model, x, weight):
        loss = (model(x) * torch.from_numpy(weight)).square().mean()
        loss.backward()
        return loss.detach()

    accepted(private(step, in_dims={"weight": None}), model,
             lambda model, x: (model(x) * torch.from_numpy(weight)).square().mean(),
             (x, weight), (x,))


@pytest.mark.parametrize("scale", [
    np.float32(2), np.float64(2), np.int64(2), np.array(2, np.float32), torch.tensor(2.0),
], ids=["float32", "float64", "int64", "array", "tensor"])
def test_scalar_that_may_come_from_data(scale):
    """It has no batch axis, and may be a statistic of the batch."""
    def step(model, x, scale):
        loss = (model(x) * torch.as_tensor(scale)).square().mean()
        loss.backward()

    text = refused(private(step), mlp(), torch.randn(4, 6), scale)
    assert "scale has 0 dims" in text
    assert "in_dims={'scale': None}" in text


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("scale", [2.5, 3, True])
def test_python_numbers(scale, dynamic):
    model, x = mlp(), torch.randn(4, 6)

    def step(model, x, scale):
        loss = (model(x) * scale).square().mean()
        loss.backward()
        return loss.detach()

    accepted(private(step, dynamic=dynamic), model,
             lambda model, x: (model(x) * scale).square().mean(), (x, scale), (x,))


# --- modules


def test_plain_attribute_of_a_module():
    x = torch.randn(4, 6)
    text = refused(private(centred_loss), Centred(reference=x.clone()), x)
    assert "model.reference is a tensor that the module holds as a plain attribute" in text
    assert "register_buffer('reference'" in text
    assert "in_dims={'model': {'reference': None}}" in text


def test_plain_attribute_of_a_module_deep_inside():
    x = torch.randn(4, 6)
    model = nn.Sequential(Centred(reference=x.clone()), nn.Tanh())
    text = refused(private(centred_loss), model, x)
    assert "in_dims={'model': {'0': {'reference': None}}}" in text


def test_list_of_a_module():
    def step(model, x):
        loss = model.inner(x - model.references[0].mean(0)).square().mean()
        loss.backward()

    x = torch.randn(4, 6)
    text = refused(private(step), Centred(references=[x.clone()]), x)
    assert "model.references[0]" in text
    assert "in_dims={'model': {'references': {0: None}}}" in text


def test_compiled_module_with_a_plain_attribute():
    x = torch.randn(4, 6)
    model = Centred(reference=x.clone())
    step = torch.compile(model, backend="flashnorm", options=OPTIONS)
    assert "in_dims={'self': {'reference': None}}" in refused(step, x)


def test_plain_attribute_that_requires_a_gradient():
    x = torch.randn(4, 6)
    model = Centred(reference=x.clone().requires_grad_())
    assert "model.reference" in refused(private(centred_loss), model, x)


@pytest.mark.parametrize("in_dims", [(None, 0), {"model": None}])
def test_a_module_without_batch_axis_says_nothing_of_its_attributes(in_dims):
    """vmap's convention has None for the model, whatever hangs on it."""
    x = torch.randn(4, 6)
    step = private(centred_loss, in_dims=in_dims)
    assert "model.reference" in refused(step, Centred(reference=x.clone()), x)


@pytest.mark.parametrize("as_what", ["declared", "buffer", "parameter"])
def test_constants_of_a_module(as_what):
    reference, x = torch.randn(5, 6), torch.randn(4, 6)
    options = {}
    model = Centred()
    if as_what == "buffer":
        model.register_buffer("reference", reference)
    elif as_what == "parameter":
        model.reference = nn.Parameter(reference, requires_grad=False)
    else:
        model.reference = reference
        options["in_dims"] = {"model": {"reference": None}}
    accepted(private(centred_loss, **options), model,
             lambda model, x: model(x).square().mean(), (x,), (x,))


def test_attribute_declared_as_samples():
    x = torch.randn(4, 6)
    step = private(centred_loss, in_dims={"model": {"reference": 0}})
    assert "averages over the batch axis" in refused(step, Centred(reference=x.clone()), x)


@pytest.mark.parametrize("batch_first", [True, False])
def test_buffer_that_is_the_batch(batch_first):
    """One tensor under two names is one input of the graph."""
    model, x = Centred(), torch.randn(4, 6)
    model.register_buffer("reference", x)

    def step(model, x):
        first, second = (x, model.reference) if batch_first else (model.reference, x)
        loss = (model.inner(first) - model.inner(second.mean(0))).square().mean()
        loss.backward()

    text = refused(private(step), model, x)
    assert "x shares its memory with model.reference" in text


def test_buffer_that_is_a_view_of_the_batch():
    model, x = Centred(), torch.randn(4, 6)
    model.register_buffer("reference", x[1:])
    text = refused(private(centred_loss), model, x)
    assert "x shares its memory with model.reference" in text
    assert "clone()" in text


def test_buffer_that_becomes_a_view_of_the_batch_later():
    model, x = Centred(), torch.randn(4, 6)
    model.register_buffer("reference", torch.randn(4, 6))
    step = private(centred_loss)
    step(model, torch.randn(4, 6))
    model.zero_grad()
    model.reference = x.view(4, 6)
    assert "x shares its memory with model.reference" in refused(step, model, x)
    assert all(param.grad is None for param in model.parameters())


def test_buffer_that_shares_an_array_with_the_batch():
    model, array = Centred(), np.ones((4, 6), np.float32)
    model.register_buffer("reference", torch.from_numpy(array))

    def step(model, array):
        loss = model(torch.from_numpy(array)).square().mean()
        loss.backward()

    assert "shares its memory with model.reference" in refused(private(step), model, array)


def test_weights_of_a_loss_that_share_memory():
    """Constants may share memory with each other, where they are known to be constants."""
    x, y, weight = torch.randn(4, 6), torch.randint(3, (4,)), torch.rand(3)

    class Trainer:
        def __init__(self):
            self.model, self.weight = mlp(), weight
            self.criterion = nn.CrossEntropyLoss(weight=weight, reduction="none")

        def step(self, x, y):
            loss = self.criterion(self.model(x), y).mean()
            loss.backward()
            return loss.detach()

    assert "self['weight'] shares its memory with criterion.weight" in refused(
        private(Trainer().step), x, y
    )
    step = private(Trainer().step, in_dims={"self": {"weight": None}})
    step(x, y)
    assert torch.isfinite(step.per_sample_norms).all()


# --- parameters as arguments


def test_frozen_parameter_as_an_argument():
    """The class says nothing about what is in it."""
    def step(model, x, other):
        loss = model(x - other.mean(0)).square().mean()
        loss.backward()

    x = torch.randn(4, 6)
    frozen = nn.Parameter(x.clone(), requires_grad=False)
    assert "averages over the batch axis" in refused(private(step), mlp(), x, frozen)


def test_frozen_parameter_declared_as_a_constant():
    model, x = mlp(), torch.randn(4, 6)
    frozen = nn.Parameter(torch.randn(5, 6), requires_grad=False)

    def step(model, x, other):
        loss = model(x - other.mean(0)).square().mean()
        loss.backward()
        return loss.detach()

    accepted(private(step, in_dims={"other": None}), model,
             lambda model, x: model(x - frozen.mean(0)).square().mean(), (x, frozen), (x,))


# --- the remedies that messages name


def test_sizes_disagree_in_a_dict():
    """Declaring the whole batch a constant would switch the protection off."""
    def step(model, batch):
        loss = F.cross_entropy(model(batch["x"]), batch["y"], weight=batch["w"])
        loss.backward()

    batch = {"x": torch.randn(4, 6), "y": torch.randint(3, (4,)), "w": torch.rand(3)}
    text = refused(private(step), mlp(), batch)
    assert "in_dims={'batch': {'w': None}}" in text
    assert "'batch': None" not in text


def test_sizes_disagree_on_a_trainer():
    class Trainer:
        def __init__(self):
            self.model, self.weight = mlp(), torch.rand(3)

        def step(self, x, y):
            loss = F.cross_entropy(self.model(x), y, weight=self.weight)
            loss.backward()

    text = refused(private(Trainer().step), torch.randn(4, 6), torch.randint(3, (4,)))
    assert "in_dims={'self': {'weight': None}}" in text
    assert "'self': None" not in text


def test_remedy_for_class_weights_in_a_dict():
    model, x, y, w = mlp(), torch.randn(4, 6), torch.randint(3, (4,)), torch.rand(3)

    def step(model, batch):
        losses = F.cross_entropy(model(batch["x"]), batch["y"], weight=batch["w"],
                                 reduction="none")
        loss = losses.mean()
        loss.backward()
        return loss.detach()

    accepted(private(step, in_dims={"batch": {"w": None}}), model,
             lambda model, x, y: F.cross_entropy(model(x), y, weight=w, reduction="none").mean(),
             ({"x": x, "y": y, "w": w},), (x, y))


def test_scalar_in_a_dict():
    def step(model, batch):
        loss = (model(batch["x"]) / batch["count"]).square().mean()
        loss.backward()

    text = refused(private(step), mlp(), {"x": torch.randn(4, 6), "count": torch.tensor(4)})
    assert "in_dims={'batch': {'count': None}}" in text
