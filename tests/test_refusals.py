"""Steps that could leak for reasons other than mixing: refused, with nothing in ``.grad``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo_dense import mlp

import flashnorm_compile as fn

OPTIONS = {
    "max_grad_norm": 1.0,
    "noise_multiplier": 0.0,
    "expected_batch_size": 4,
    "lowering": "eager",
}


def refused(step, model, *batch) -> str:
    with pytest.raises(fn.PrivacyError) as caught:
        step(model, *batch)
    assert all(param.grad is None for param in model.parameters())
    return str(caught.value)


def square_loss_step():
    @fn.dp_step(**OPTIONS)
    def step(model, x):
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    return step


@torch.library.custom_op("flashnorm_tests::halve", mutates_args=())
def halve(x: torch.Tensor) -> torch.Tensor:
    """Stand for an operation of a library that the analysis has never heard of."""
    return x / 2


halve.register_fake(torch.empty_like)
halve.register_autograd(lambda _, gradient: gradient / 2)


def test_operation_without_a_rule():
    class Halved(nn.Linear):
        def forward(self, x):
            return halve(super().forward(x))

    text = refused(square_loss_step(), Halved(6, 3), torch.randn(4, 6))
    assert "no batch-axis rule for flashnorm_tests.halve" in text
    assert "test_refusals.py" in text


drops_checks = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch before 2.13 compiles linear algebra without checks"
)


@drops_checks
@pytest.mark.parametrize("size", [4, 1])
def test_check_that_fails_for_some_samples(size):
    """An inverse raises an error for the sample that has none."""
    @fn.dp_step(**OPTIONS)
    def step(model, x):
        inverse = torch.linalg.inv(x.unflatten(1, (2, 2)))
        loss = model(inverse.flatten(1)).square().mean()
        loss.backward()

    text = refused(step, nn.Linear(4, 3), torch.randn(size, 4))
    assert "side effect that depends on samples" in text
    assert "aten._linalg_check_errors" in text
    assert "test_refusals.py" in text
    assert "inv_ex" in text


def test_inverse_without_a_check():
    """The remedy that the refusal names."""
    @fn.dp_step(**OPTIONS)
    def step(model, x):
        inverse = torch.linalg.inv_ex(x.unflatten(1, (2, 2)))[0]
        loss = model(inverse.flatten(1)).square().mean()
        loss.backward()

    step(nn.Linear(4, 3), torch.randn(4, 4))
    assert torch.isfinite(step.per_sample_norms).all()


@drops_checks
def test_check_of_weights_still_runs():
    """As in eager mode: a weight without an inverse is an error, not a gradient of NaN."""
    class Inverse(nn.Module):
        def forward(self, weight):
            return torch.linalg.inv(weight)

    model = nn.Linear(6, 6)
    nn.utils.parametrize.register_parametrization(model, "weight", Inverse())
    step = square_loss_step()
    step(model, torch.randn(4, 6))
    model.zero_grad()
    with torch.no_grad():
        model.parametrizations.weight.original.zero_()
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        step(model, torch.randn(4, 6))


def test_other_side_effects():
    """Of a weight alone, yet nobody knows what an effect may bring into the graph."""
    @fn.dp_step(**OPTIONS)
    def step(model, x):
        torch.ops.aten._print("here")
        loss = model(x).square().mean()
        loss.backward()

    assert "side effect" in refused(step, mlp(), torch.randn(4, 6))


def test_no_batch_input():
    @fn.dp_step(**OPTIONS)
    def step(model):
        loss = model(torch.ones(4, 6)).square().mean()
        loss.backward()

    assert "batch" in refused(step, mlp())


def test_batch_inputs_disagree():
    @fn.dp_step(**OPTIONS)
    def step(model, x, y):
        loss = model(x).square().mean() + y.mean() * model(x).mean()
        loss.backward()

    text = refused(step, mlp(), torch.randn(4, 6), torch.randn(5))
    assert "4" in text
    assert "5" in text
    assert "in_dims" in text


def test_data_from_a_closure():
    data = torch.randn(4, 6)

    @fn.dp_step(**OPTIONS)
    def step(model, x):
        loss = model(x + data).square().mean()
        loss.backward()

    text = refused(step, mlp(), torch.randn(4, 6))
    assert "data" in text


def test_batch_input_that_requires_a_gradient():
    @fn.dp_step(**OPTIONS)
    def step(model, x):
        loss = model(x).square().mean()
        loss.backward()

    x = torch.randn(4, 6, requires_grad=True)
    assert "detach" in refused(step, mlp(), x)
    assert x.grad is None


def test_in_dims_that_names_no_argument():
    """A misspelt name would silently leave the default axis in place."""
    @fn.dp_step(**OPTIONS, in_dims={"z": 1})
    def step(model, x):
        loss = model(x).square().mean()
        loss.backward()

    assert "z" in refused(step, mlp(), torch.randn(4, 6))


def test_graph_break_in_the_forward():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            hidden = self.first(x)
            torch._dynamo.graph_break()
            return self.second(hidden)

    @fn.dp_step(**OPTIONS)
    def step(model, x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()

    text = refused(step, Broken(), torch.randn(4, 6), torch.randint(3, (4,)))
    assert "break" in text


def test_part_of_the_model_outside_the_compiler():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        @torch.compiler.disable
        def hidden(self, x):
            return self.first(x).tanh()

        def forward(self, x):
            return self.second(self.hidden(x))

    @fn.dp_step(**OPTIONS)
    def step(model, x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()

    refused(step, Outside(), torch.randn(4, 6), torch.randint(3, (4,)))


def test_all_work_outside_the_compiler():
    @torch.compiler.disable
    def plain_step(model, x):
        model(x).square().mean().backward()

    @fn.dp_step(**OPTIONS)
    def step(model, x):
        plain_step(model, x)

    refused(step, mlp(), torch.randn(4, 6))


def test_backward_of_another_loss_outside_the_compiler():
    """One loss is private; a second backward, hidden from Dynamo, is not."""
    @torch.compiler.disable
    def more(model, x):
        model(x).abs().mean().backward()

    @fn.dp_step(**OPTIONS)
    def step(model, x):
        loss = model(x).square().mean()
        loss.backward()
        more(model, x)

    refused(step, mlp(), torch.randn(4, 6))


def test_decorator_over_a_disabled_function():
    """``dp_step`` compiles it all the same, or refuses; either way nothing is unclipped."""
    model = mlp()

    @fn.dp_step(**OPTIONS | {"expected_batch_size": 1.0, "max_grad_norm": 1e-3})
    @torch.compiler.disable
    def step(model, x):
        loss = 100 * model(x).square().mean()
        loss.backward()

    try:
        step(model, torch.randn(4, 6))
    except fn.PrivacyError:
        assert all(param.grad is None for param in model.parameters())
        return
    total = torch.cat([param.grad.flatten() for param in model.parameters()]).norm()
    assert total <= 4e-3 * 1.001


@torch._dynamo.config.patch(disable=True)
def test_compilation_switched_off():
    @fn.dp_step(**OPTIONS)
    def step(model, x):
        loss = model(x).square().mean()
        loss.backward()

    refused(step, mlp(), torch.randn(4, 6))


# The second setting stands after a compilation with backend="flashnorm"; torch refuses the pair.
@pytest.mark.parametrize("strict_before", [False, True])
def test_suppressed_errors(strict_before, monkeypatch):
    """With suppress_errors Dynamo answers a refusal by running the plain step."""
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", True)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", strict_before)

    @fn.dp_step(**OPTIONS)
    def step(model, x):
        loss = (model(x) - x.mean(0, keepdim=True)[:, :3]).square().mean()
        loss.backward()

    refused(step, mlp(), torch.randn(4, 6))


@torch._dynamo.config.patch(recompile_limit=2)
def test_recompile_limit():
    """Past its limit Dynamo runs the plain step with a warning."""
    model = mlp()

    @fn.dp_step(**OPTIONS)
    def step(model, x, power: str):
        loss = model(x).abs().pow(len(power)).mean()
        loss.backward()

    x = torch.randn(4, 6)
    step(model, x, "a")
    step(model, x, "aa")
    model.zero_grad()
    refused(step, model, x, "aaa")


def test_tensor_hook_on_a_parameter():
    """A hook would see the gradient of the parameter; it must see the private one or nothing."""
    model, seen = mlp(), []
    model[0].weight.register_hook(lambda gradient: seen.append(gradient.norm().item()))

    @fn.dp_step(**OPTIONS | {"expected_batch_size": 1.0, "max_grad_norm": 1e-3})
    def step(model, x):
        loss = 100 * model(x).square().mean()
        loss.backward()

    try:
        step(model, torch.randn(4, 6))
    except fn.PrivacyError:
        assert all(param.grad is None for param in model.parameters())
    assert all(norm <= 4e-3 * 1.001 for norm in seen)


def test_backward_twice_releases_no_raw_gradient():
    model = mlp()

    @fn.dp_step(**OPTIONS | {"expected_batch_size": 1.0, "max_grad_norm": 1e-3})
    def step(model, x):
        loss = 100 * model(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()

    # torch itself refuses to retain what a compiled backward gives away.
    expected = r"second backward|donated buffer"
    with pytest.raises((fn.PrivacyError, RuntimeError), match=expected):
        step(model, torch.randn(4, 6))
    total = [param.grad.flatten() for param in model.parameters() if param.grad is not None]
    assert not total or torch.cat(total).norm() <= 4e-3 * 1.001


def test_second_loss_that_bypasses_the_graph():
    """A term added to the loss after a graph break reaches the parameters unclipped."""
    model = mlp()

    @fn.dp_step(**OPTIONS)
    def step(model, x):
        loss = model(x).square().mean()
        torch._dynamo.graph_break()
        loss = loss + model[0](x).abs().mean()
        loss.backward()

    refused(step, model, torch.randn(4, 6))


@pytest.mark.parametrize(("options", "word"), [
    ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm"),
    ({"noise_multiplier": -0.1}, "noise_multiplier"),
    ({"expected_batch_size": 0}, "expected_batch_size"),
    ({"expected_batch_size": None}, "expected_batch_size"),
    ({"loss_reduction": "average"}, "loss_reduction"),
    ({"strategy": "fastest"}, "strategy"),
    ({"lowering": "none"}, "lowering"),
    ({"seed": -3}, "seed"),
])
def test_bad_options(options, word):
    with pytest.raises(fn.PrivacyError, match=word):
        fn.dp_step(**OPTIONS | options)(lambda model, x: None)


@pytest.mark.parametrize("missing", ["max_grad_norm", "noise_multiplier"])
def test_missing_options(missing):
    options = {name: value for name, value in OPTIONS.items() if name != missing}
    step = torch.compile(lambda x: x.sum().backward(), backend="flashnorm", options=options)
    with pytest.raises(Exception, match=missing) as caught:
        step(nn.Parameter(torch.ones(3)))
    assert isinstance(caught.value, fn.PrivacyError) or isinstance(
        caught.value.__cause__, fn.PrivacyError
    )
