"""What leaves a step: noise, its records, and the guards around ``.grad``."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from driver import call, clip, private_step, read_result, run_oracle
from oracle import assert_matches_oracle
from torch import nn
from zoo_modules import all_cases

import flashnorm_compile as fn
from flashnorm_compile.noise_streams import repeat_noise
from flashnorm_compile.passes import release

SIGMA, CLIP, EXPECTED = 2.0, 0.5, 4


def make(model=None, function=None, **options):
    model = model or nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 40))

    def default(model, x):
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    settings = {
        "max_grad_norm": CLIP,
        "noise_multiplier": SIGMA,
        "expected_batch_size": EXPECTED,
        "lowering": "eager",
        "seed": 11,
    }
    return model, fn.dp_step(function or default, **{**settings, **options})


def noise_of(model, step):
    """One release without samples: noise alone, per parameter."""
    model.zero_grad()
    step(model, torch.zeros(0, 40))
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_noise_is_gaussian_of_the_stated_size():
    model, step = make()
    draws = torch.cat([g.flatten() for _ in range(5) for g in noise_of(model, step).values()])
    z = draws * EXPECTED / (SIGMA * CLIP)
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert abs(z.mean()) < 5 / len(z) ** 0.5


@pytest.mark.parametrize("autocast", [False, True])
def test_all_gradients_leave_in_one_call(autocast):
    """Those of biases come in another shape than their per-sample sums."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    def step(model, x, y):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        return loss.detach()

    private = fn.dp_step(
        step, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4, lowering="eager",
        strategy="materialize",
    )  # fmt: skip
    private(model, torch.randn(4, 5, 3), torch.randint(2, (4, 5)))
    assert private.graphs[0].count("torch.ops.flashnorm.release.default") == 1


@pytest.mark.parametrize(("name", "kernels"), [
    ("sharing-tied_head", "fused"),
    ("sharing-siamese", "library"),
    ("dense-mlp_time_axis", "fused"),
])
def test_some_are_released_before_the_next_are_summed(name, kernels, monkeypatch):
    """Each parameter by itself: sites that several of them share are summed once."""
    monkeypatch.setattr(release, "SUMS_BYTES", 1)
    case = all_cases()[name]
    model, batch = case.build_model(), case.build_batch()
    expected = clip(run_oracle(case, batch), 1.0, case.loss_reduction)
    step = private_step(case.loss, kernels=kernels, strategy="ghost")
    found = read_result(step, model, call(step, model, batch))
    assert_matches_oracle(expected, norms=found.norms, factors=found.factors, grads=found.grads)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert step.graphs[0].count("torch.ops.flashnorm.release.default") == trained


def test_noise_of_parts_is_independent(monkeypatch):
    monkeypatch.setattr(release, "SUMS_BYTES", 1)
    model, step = make(nn.ModuleList([nn.Linear(40, 40, bias=False) for _ in range(3)]),
                       lambda model, x: step_over(model, x))
    streams = []
    for _ in range(2):
        model.zero_grad()
        # Gradients of zeros: what is released is noise.
        step(model, torch.zeros(4, 40))
        streams += [parameter.grad.flatten() for parameter in model.parameters()]
    assert step.graphs[0].count("torch.ops.flashnorm.release.default") == 3
    off_diagonal = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert off_diagonal.abs().max() < 0.12


def test_noise_is_independent_across_parameters_and_steps():
    # Equal shapes: equal streams would show as equal values.
    model, step = make(nn.ModuleList([nn.Linear(40, 40, bias=False) for _ in range(3)]),
                       lambda model, x: step_over(model, x))
    releases = [list(noise_of(model, step).values()) for _ in range(3)]
    streams = [g.flatten() for release in releases for g in release]
    correlation = torch.corrcoef(torch.stack(streams))
    off_diagonal = correlation - torch.eye(len(streams))
    # 1600 entries: the standard error of a correlation is 0.025.
    assert off_diagonal.abs().max() < 0.12


def step_over(model, x):
    for layer in model:
        x = layer(x)
    loss = x.square().mean()
    loss.backward()
    return loss.detach()


def test_noise_is_added_to_the_clipped_sum():
    model, step = make()
    x = torch.randn(5, 40)
    step.noise_multiplier = 0.0
    step(model, x)
    clean = [p.grad.clone() for p in model.parameters()]
    step.noise_multiplier = SIGMA
    difference = []
    for _ in range(20):
        model.zero_grad()
        step(model, x)
        difference += [
            (p.grad - c).flatten() for p, c in zip(model.parameters(), clean, strict=True)
        ]
    z = torch.cat(difference) * EXPECTED / (SIGMA * CLIP)
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 1e-3


def test_seed_reproduces_a_run_and_no_seed_does_not():
    with repeat_noise():
        first = noise_of(*make())
    with repeat_noise():
        second = noise_of(*make())
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    third = noise_of(*make(seed=None))
    assert all(not torch.equal(first[name], third[name]) for name in first)


def test_resume_continues_the_stream():
    model, step = make()
    noise_of(model, step)
    saved = step.state_dict()
    expected = noise_of(model, step)
    _, resumed = make(seed=None)
    with repeat_noise():
        resumed.load_state_dict(saved)
    found = noise_of(model, resumed)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_state_of_something_else_is_refused():
    _, step = make()
    with pytest.raises(fn.PrivacyError, match="a step's state holds"):
        step.load_state_dict({"seed": 1})


def test_release_is_recorded_before_the_noise():
    events = []

    class Accountant:
        def record(self, **release):
            events.append(all(p.grad is None for p in model.parameters()))

    model, step = make(accountant=Accountant(), sampling_rate=0.25)
    step(model, torch.randn(3, 40))
    assert events == [True]


def test_a_refusing_accountant_stops_the_release():
    class Accountant:
        def record(self, **release):
            raise ValueError("budget spent")

    model, step = make(accountant=Accountant(), sampling_rate=0.25)
    with pytest.raises(ValueError, match="budget spent"):
        step(model, torch.randn(3, 40))
    assert all(p.grad is None for p in model.parameters())


def test_accountant_needs_the_sampling_rate():
    with pytest.raises(fn.PrivacyError, match="sampling_rate with an accountant"):
        make(accountant=object())


def test_optimizer_refuses_a_gradient_from_elsewhere():
    model, step = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, torch.randn(3, 40))
    optimizer.step()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(3, 40)).square().mean().backward()
    with pytest.raises(fn.PrivacyError, match="did not come out of a private backward"):
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=0, atol=0)


def test_optimizer_refuses_a_gradient_that_was_added_to():
    model, step = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, torch.randn(3, 40))
    model(torch.randn(3, 40)).square().mean().backward()
    with pytest.raises(fn.PrivacyError, match="or was changed since"):
        optimizer.step()


def test_optimizer_refuses_two_releases_in_one_gradient():
    model, step = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, torch.randn(3, 40))
    step(model, torch.randn(3, 40))
    with pytest.raises(fn.PrivacyError, match="holds 2 releases"):
        optimizer.step()


def test_optimizers_of_other_models_are_left_alone():
    make()
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(2, 3)).sum().backward()
    optimizer.step()


def test_gradient_left_over_from_eager_is_refused():
    model, step = make()
    model(torch.randn(3, 40)).square().mean().backward()
    with pytest.raises(fn.PrivacyError, match="already holds a gradient that is not private"):
        step(model, torch.randn(3, 40))


def test_loss_scaled_outside_is_refused():
    model, step = make(function=lambda model, x: model(x).square().mean())
    loss = step(model, torch.randn(3, 40))
    with pytest.raises(fn.PrivacyError, match="did not start from the loss"):
        (loss * 3).backward()


def test_regulariser_outside_is_refused():
    model, step = make(function=lambda model, x: model(x).square().mean())
    loss = step(model, torch.randn(3, 40))
    with pytest.raises(fn.PrivacyError, match="from outside the compiled step"):
        (loss + model[0].weight.square().sum()).backward()
    assert all(p.grad is None for p in model.parameters())


def test_ddp_is_refused(monkeypatch):
    monkeypatch.setattr("flashnorm_compile._torch.active_ddp_module", lambda: object())
    model, step = make()
    with pytest.raises(fn.PrivacyError, match="DistributedDataParallel"):
        step(model, torch.randn(3, 40))


def test_gradient_traced_into_the_graph_never_reaches_the_optimizer():
    """Dynamo can trace autograd itself; then no backward of ours runs."""
    model = nn.Linear(4, 2)

    def function(model, x):
        loss = F.mse_loss(model(x), torch.zeros(x.shape[0], 2))
        loss.backward()
        return loss.detach()

    _, step = make(model, function)
    with (
        torch._dynamo.config.patch(trace_autograd_ops=True),
        pytest.raises(Exception, match=r"private|autograd"),
    ):
        step(model, torch.randn(3, 4))
    assert model.weight.grad is None


def test_optimizer_is_guarded_for_the_backend_by_name():
    """A step that stops compiling, by a stance here, must not train on raw gradients."""
    model = nn.Linear(40, 40)
    optimizer = torch.optim.SGD(model.parameters())
    options = {"max_grad_norm": CLIP, "noise_multiplier": SIGMA, "expected_batch_size": EXPECTED}

    def step(x):
        model(x).square().mean().backward()

    compiled = torch.compile(step, backend="flashnorm", options={**options, "lowering": "eager"})
    compiled(torch.randn(4, 40))
    optimizer.step()
    optimizer.zero_grad()
    with torch.compiler.set_stance("force_eager"):
        with pytest.raises(fn.PrivacyError, match="would compute a gradient of"):
            compiled(torch.randn(4, 40))
        assert model.weight.grad is None
        model(torch.randn(4, 40)).square().mean().backward()
    with pytest.raises(fn.PrivacyError, match="did not come out of a private backward"):
        optimizer.step()
    assert model.weight.grad is None


def test_raw_gradient_at_the_address_of_a_released_one_is_refused():
    model, step = make(nn.Linear(40, 40, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step(model, torch.randn(3, 40))
    address = model.weight.grad.untyped_storage()
    version = model.weight.grad._version
    model.weight.grad = None
    raw = torch.empty(0).set_(address).view(40, 40)
    while raw._version < version:
        raw.add_(1)
    model.weight.grad = raw
    assert raw._version == version
    with pytest.raises(fn.PrivacyError, match="did not come out of a private backward"):
        optimizer.step()


def test_changes_of_a_released_gradient_are_refused_by_name():
    model, step = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, torch.randn(3, 40))
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with pytest.raises(fn.PrivacyError, match=r"changed since.*clip_grad_norm_.*set_to_none"):
        optimizer.step()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
@pytest.mark.parametrize("keyword", [False, True])
def test_raw_backward_in_a_closure_is_refused(kind, keyword, inside):
    model, step = make()
    optimizer, x = kind(model.parameters(), lr=0.1), torch.randn(3, 40)
    step(model, x)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = 1000 * model(x).square().mean()
        loss.backward()
        return loss

    def run(_x):
        return optimizer.step(closure=closure) if keyword else optimizer.step(closure)

    _, other = make(function=run)
    with pytest.raises(fn.PrivacyError, match=r"did not come out of a private backward|backward"):
        other(x) if inside else run(x)
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_private_step_in_a_closure_trains(kind):
    model, step = make(noise_multiplier=0.0)
    optimizer, x = kind(model.parameters(), lr=0.1), torch.randn(3, 40)
    before = model[0].weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        return step(model, x)

    for _ in range(2):
        optimizer.step(closure)
    assert not torch.equal(before, model[0].weight)


def test_closure_that_runs_the_first_private_step_is_checked():
    model, step = make()
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(3, 40)
    before = model[0].weight.detach().clone()

    def closure():
        step(model, x)
        model(x).square().mean().backward()

    with pytest.raises(fn.PrivacyError, match="did not come out of a private backward"):
        optimizer.step(closure)
    torch.testing.assert_close(before, model[0].weight.detach(), rtol=0, atol=0)
