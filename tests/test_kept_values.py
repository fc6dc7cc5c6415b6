"""What a step keeps of its samples: on modules, in containers, and for its own later part."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo_dense import mlp

import flashnorm_compile as fn

OPTIONS = {
    "max_grad_norm": 1.0,
    "noise_multiplier": 0.0,
    "expected_batch_size": 4,
    "lowering": "eager",
}


def private(function, **options):
    return fn.dp_step(**OPTIONS | options)(function)


def by_name(function):
    return torch.compile(function, backend="flashnorm", options=dict(OPTIONS))


COMPILE = pytest.mark.parametrize("compile_step", [private, by_name])


def refused(step, *args) -> str:
    with pytest.raises(fn.PrivacyError) as caught:
        step(*args)
    text = str(caught.value)
    assert "test_kept_values.py" in text, text
    return text


class Recorder(nn.Module):
    """Keeps something of each batch, in a way that a subclass chooses."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.cache, self.table, self.holder = [], {}, Holder()
        self.ready = {"nested": [0]}

    def keep(self, x, hidden):
        raise NotImplementedError

    def forward(self, x):
        hidden = self.inner(x)
        self.keep(x, hidden)
        return hidden


class Holder:
    pass


def square_loss(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


KEEP = {
    "list": lambda self, x, hidden: self.cache.append(hidden),
    "detached": lambda self, x, hidden: self.cache.append(hidden.detach()),
    "scalar": lambda self, x, hidden: self.cache.append(hidden.detach().mean()),
    "dict": lambda self, x, hidden: self.table.__setitem__("hidden", hidden.detach()),
    "update": lambda self, x, hidden: self.table.update(hidden=hidden.detach()),
    "object": lambda self, x, hidden: setattr(self.holder, "hidden", hidden.detach()),
    "nested": lambda self, x, hidden: self.ready["nested"].append(hidden.detach()),
    "replaced": lambda self, x, hidden: setattr(self, "cache", [hidden.detach()]),
    "in a tuple": lambda self, x, hidden: setattr(self, "last", (1, {"h": hidden.detach()})),
    "attribute": lambda self, x, hidden: setattr(self, "last", hidden.detach()),
    "submodule": lambda self, x, hidden: setattr(self.inner, "last", hidden.detach()),
    "samples": lambda self, x, hidden: setattr(self, "last", x),
    "samples in a list": lambda self, x, hidden: self.cache.append(x),
}


@COMPILE
@pytest.mark.parametrize("how", KEEP)
def test_kept_on_a_module(how, compile_step):
    model = type("Keeping", (Recorder,), {"keep": KEEP[how]})()
    text = refused(compile_step(square_loss), model, torch.randn(4, 6))
    assert "keeps a value that depends on samples" in text
    assert "model." in text
    assert "Return it from the step instead" in text
    assert not model.cache
    assert not model.table
    assert not hasattr(model, "last")
    assert all(param.grad is None for param in model.parameters())


def test_batch_kept_whole_on_a_module():
    def step(model, batch):
        model.last = batch
        loss = model(batch["x"]).square().mean()
        loss.backward()

    refused(private(step), mlp(), {"x": torch.randn(4, 6), "y": torch.randn(4)})


def test_kept_on_a_module_after_backward():
    def step(model, x):
        hidden = model(x)
        loss = hidden.square().mean()
        loss.backward()
        model.last = hidden.detach()

    assert "model.last" in refused(private(step), mlp(), torch.randn(4, 6))


def test_kept_in_an_argument():
    def step(model, x, kept):
        hidden = model(x)
        kept.append(hidden.detach())
        loss = hidden.square().mean()
        loss.backward()

    text = refused(private(step), mlp(), torch.randn(4, 6), [])
    assert "kept" in text
    assert "Return it from the step instead" in text


def test_loss_kept_with_its_graph():
    losses = []

    def step(model, x):
        loss = model(x).square().mean()
        losses.append(loss)
        loss.backward()

    assert "detach" in refused(private(step), mlp(), torch.randn(4, 6))


def test_kept_in_the_batch():
    def step(model, batch):
        batch["hidden"] = model(batch["x"])
        loss = batch["hidden"].square().mean()
        loss.backward()

    assert "batch" in refused(private(step), mlp(), {"x": torch.randn(4, 6)})


def test_kept_in_a_variable_outside():
    last = None

    def step(model, x):
        nonlocal last
        last = model(x).detach()
        loss = model(x).square().mean()
        loss.backward()

    assert "last" in refused(private(step), mlp(), torch.randn(4, 6))


# --- kept for later in the same step


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 4)


@COMPILE
def test_batch_made_before_an_earlier_backward(compile_step):
    def step(model, batch):
        batch["z"] = batch["x"] - batch["x"].mean(0)
        loss = model.first(batch["x"]).square().mean()
        loss.backward()
        loss = model.second(batch["z"]).square().mean()
        loss.backward()

    assert "batch['z']" in refused(compile_step(step), Two(), {"x": torch.randn(4, 6)})


@COMPILE
def test_attribute_made_before_an_earlier_backward(compile_step):
    class Trainer:
        def __init__(self):
            self.model = Two()

        def step(self, x):
            self.z = x - x.mean(0)
            loss = self.model.first(x).square().mean()
            loss.backward()
            loss = self.model.second(self.z).square().mean()
            loss.backward()

    assert "z" in refused(compile_step(Trainer().step), torch.randn(4, 6))


def centre_in_dict(batch):
    batch["x"] = batch["x"] - batch["x"].mean(0)


def centre_in_place(batch):
    batch["x"].sub_(batch["x"].mean(0))


def centre_data(batch):
    batch["x"].data.sub_(batch["x"].mean(0))


def centre_by_setting_data(batch):
    batch["x"].data = batch["x"] - batch["x"].mean(0)


def centre_rows(batch):
    batch["x"][1:] = batch["x"][1:] - batch["x"].mean(0)


def centre_into(batch):
    torch.sub(batch["x"], batch["x"].mean(0), out=batch["x"])


@COMPILE
@pytest.mark.parametrize("centre", [
    centre_in_dict, centre_in_place, centre_data, centre_by_setting_data, centre_rows, centre_into,
])
def test_batch_changed_before_the_optimizer(centre, compile_step):
    def step(model, optimizer, batch):
        centre(batch)
        optimizer.step()
        loss = model(batch["x"]).square().mean()
        loss.backward()

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(fn.PrivacyError, match=r"changes batch|keeps a value"):
        compile_step(step)(model, optimizer, {"x": torch.randn(4, 6)})
    assert all(param.grad is None for param in model.parameters())


@COMPILE
def test_argument_changed_before_the_optimizer(compile_step):
    def step(model, optimizer, x):
        x.sub_(x.mean(0))
        optimizer.step()
        loss = model(x).square().mean()
        loss.backward()

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(fn.PrivacyError, match="changes x"):
        compile_step(step)(model, optimizer, torch.randn(4, 6))


@COMPILE
def test_batch_changed_in_some_calls_only(compile_step):
    """What follows the optimizer is compiled before the change ever happens."""
    def step(model, optimizer, batch, centred: bool):
        if centred:
            batch["x"] = batch["x"] - batch["x"].mean(0)
        optimizer.step()
        loss = model(batch["x"]).square().mean()
        loss.backward()
        return loss.detach()

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = compile_step(step)
    step(model, optimizer, {"x": torch.randn(4, 6)}, False)
    model.zero_grad()
    with pytest.raises(fn.PrivacyError, match="batch"):
        step(model, optimizer, {"x": torch.randn(4, 6)}, True)
    assert all(param.grad is None for param in model.parameters())


# --- what is fine


@COMPILE
def test_detached_loss_in_a_list(compile_step):
    losses, metrics = [], {"count": 0}

    def step(model, x):
        loss = model(x).square().mean()
        losses.append(loss.detach())
        metrics["loss"] = loss.detach()
        metrics["count"] += 1
        loss.backward()

    model, step = mlp(), compile_step(step)
    for _ in range(3):
        model.zero_grad()
        step(model, torch.randn(4, 6))
    assert len(losses) == 3
    assert metrics["count"] == 3
    assert all(param.grad is not None for param in model.parameters())


@COMPILE
def test_detached_loss_on_a_trainer(compile_step):
    class Trainer:
        def __init__(self):
            self.model, self.average, self.steps = mlp(), torch.zeros(()), 0

        def step(self, x):
            self.steps += 1
            loss = self.model(x).square().mean()
            loss.backward()
            self.average = 0.9 * self.average + 0.1 * loss.detach()

    trainer = Trainer()
    step = compile_step(trainer.step)
    step(torch.randn(4, 6))
    assert trainer.steps == 1
    assert trainer.average > 0


@COMPILE
def test_logits_returned_or_kept_within_the_step(compile_step):
    def step(model, x):
        outputs = {"hidden": [model[0](x)]}
        outputs["logits"] = model[2](model[1](outputs["hidden"][0]))
        loss = outputs["logits"].square().mean()
        loss.backward()
        return outputs["logits"].detach()

    assert compile_step(step)(mlp(), torch.randn(4, 6)).shape == (4, 3)


def test_module_that_keeps_what_no_sample_touches():
    class Positions(nn.Linear):
        def forward(self, x):
            self.positions = torch.arange(x.shape[1]).float()
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x + self.positions)

    model = Positions(6, 3)
    private(square_loss)(model, torch.randn(4, 6))
    assert model.calls == 1


@COMPILE
def test_two_backward_passes_over_one_batch(compile_step):
    def step(model, batch):
        first = model.first(batch["x"]).square().mean()
        first.backward()
        second = model.second(batch["x"]).square().mean()
        second.backward()
        return first.detach(), second.detach()

    model = Two()
    compile_step(step)(model, {"x": torch.randn(4, 6)})
    assert all(param.grad is not None for param in model.parameters())


@COMPILE
def test_optimizer_before_and_after(compile_step):
    def step(model, optimizer, batch):
        optimizer.step()
        optimizer.zero_grad()
        loss = model(batch["x"]).square().mean()
        loss.backward()
        seen = batch["x"].abs().mean()
        optimizer.step()
        return loss.detach(), seen

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = compile_step(step)
    for _ in range(2):
        step(model, optimizer, {"x": torch.randn(4, 6)})
    assert all(param.grad is not None for param in model.parameters())


def test_features_kept_outside_training():
    """By name, a function that trains nothing may keep what it likes."""
    class Features(nn.Linear):
        def forward(self, x):
            self.last = x * 2
            return super().forward(x)

    model = Features(6, 3)
    with torch.no_grad():
        by_name(model)(torch.randn(4, 6))
    assert model.last.shape == (4, 6)
