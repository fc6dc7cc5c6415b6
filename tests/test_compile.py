"""``torch.compile`` itself: what it is given, in which mode, and what it may not skip."""

from __future__ import annotations

import pytest
import torch
from driver import EXPECTED_BATCH_SIZE, clip, gradients_of, model_oracle
from oracle import assert_matches_oracle
from torch import nn
from torch.nn import functional as F
from zoo_dense import mlp

import flashnorm_compile as fn
from flashnorm_compile import graph_pass

C = 0.4
OPTIONS = {
    "max_grad_norm": C,
    "noise_multiplier": 0.0,
    "expected_batch_size": EXPECTED_BATCH_SIZE,
    "lowering": "eager",
}
ALONE = OPTIONS | {"loss_outside": True}
MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


def xy(size: int = 4):
    return torch.randn(size, 6), torch.randint(3, (size,))


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


def step(model, x, y):
    cross_entropy(model, x, y).backward()


def check(model, x, y, max_grad_norm: float = C) -> None:
    expected = clip(model_oracle(model, cross_entropy, (x, y)), max_grad_norm, "mean")
    assert_matches_oracle(expected, norms=None, factors=None, grads=gradients_of(model))


class Wrapped(nn.Module):
    """A module of the user's own."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x)


# Until torch 2.14, module.compile() leaves torch's own modules out.
MODULES = [Wrapped, *([mlp] if torch.__version__ >= "2.15" else [])]


@pytest.mark.parametrize("make", [Wrapped, mlp])
def test_the_model_alone(make):
    """The loss outside reduces over the samples as ``loss_reduction`` says."""
    model, (x, y) = make(), xy()
    compiled = torch.compile(model, backend="flashnorm", options=ALONE)
    F.cross_entropy(compiled(x), y).backward()
    check(model, x, y)


@pytest.mark.parametrize("make", MODULES)
def test_a_module_compiled_in_place(make):
    model, (x, y) = make(), xy()
    expected = clip(model_oracle(model, cross_entropy, (x, y)), C, "mean")
    model.compile(backend="flashnorm", options=ALONE)
    F.cross_entropy(model(x), y).backward()
    assert_matches_oracle(expected, norms=None, factors=None, grads=gradients_of(model))


def test_the_model_alone_needs_a_promise_about_the_loss():
    """The loss outside may compare the samples; nobody sees it."""
    model, (x, y) = mlp(), xy()
    compiled = torch.compile(model, backend="flashnorm", options=OPTIONS)
    with pytest.raises(fn.PrivacyError, match=r"returns no loss, only outputs of shape \[B, 3\]"):
        F.cross_entropy(compiled(x), y).backward()
    assert not any(gradients_of(model).values())


@pytest.mark.skipif(mlp in MODULES, reason="torch compiles its own modules in place")
def test_a_module_that_would_not_be_compiled_is_refused():
    for _ in range(2):
        with pytest.raises(fn.PrivacyError, match=r"does not compile Sequential\.forward"):
            mlp().compile(backend="flashnorm", options=OPTIONS)
    mlp().compile(backend="eager")


def test_inference_of_a_compiled_model():
    model, (x, _) = mlp(), xy()
    compiled = torch.compile(model, backend="flashnorm", options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    model.eval().requires_grad_(False)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.inductor
@pytest.mark.parametrize("mode", MODES)
def test_mode(mode):
    model, (x, y) = mlp(), xy()
    fn.dp_step(step, mode=mode, **OPTIONS | {"lowering": "inductor"})(model, x, y)
    check(model, x, y)


@pytest.mark.inductor
def test_mode_among_the_options():
    """torch.compile takes either a mode or options."""
    model, (x, y) = mlp(), xy()
    options = OPTIONS | {"lowering": "inductor", "mode": "max-autotune"}
    torch.compile(step, backend="flashnorm", options=options)(model, x, y)
    check(model, x, y)


def test_unknown_mode():
    with pytest.raises(fn.PrivacyError, match="mode='fastest' is not valid; choose one of default"):
        fn.dp_step(step, mode="fastest", **OPTIONS)
    model = mlp()
    options = OPTIONS | {"lowering": "inductor", "mode": "fastest"}
    with pytest.raises(fn.PrivacyError, match="mode='fastest' is not valid"):
        torch.compile(step, backend="flashnorm", options=options)(model, *xy())
    assert not any(gradients_of(model).values())


def test_every_compilation_has_its_own_options():
    """The function is the same; what it was compiled with is not."""
    model, (x, y) = mlp(), xy()
    for bound in (C, C / 2, C):
        model.zero_grad()
        options = OPTIONS | {"max_grad_norm": bound}
        torch.compile(step, backend="flashnorm", options=options)(model, x, y)
        check(model, x, y, bound)


@pytest.mark.parametrize("again", [True, False])
def test_options_changed_afterwards_are_refused(again):
    """torch.compile keeps the dict, not a copy, and cannot tell the two calls apart."""
    model, (x, y), options = mlp(), xy(), dict(OPTIONS)
    compiled = torch.compile(step, backend="flashnorm", options=options)
    compiled(model, x, y)
    model.zero_grad()
    options["max_grad_norm"] = C / 2
    if again:
        compiled = torch.compile(step, backend="flashnorm", options=options)
    with pytest.raises(fn.PrivacyError, match=r"options given to torch.compile were changed"):
        compiled(model, x, y)
    assert not any(gradients_of(model).values())


def test_a_graph_that_was_not_rewritten_is_refused(monkeypatch):
    """As a compiled graph from some cache would be."""

    def from_a_cache(gm, *_):
        return gm.forward

    monkeypatch.setattr(graph_pass._torch, "compile_without_codegen", from_a_cache)
    model = mlp()
    with pytest.raises(fn.PrivacyError, match="compiled without its private rewrite"):
        fn.dp_step(step, **OPTIONS)(model, *xy())
    assert not any(gradients_of(model).values())


def test_images_are_laid_out_for_any_number_of_them():
    """Inductor's rule, which is not asked on a CPU, takes a symbolic B for a known one."""
    import torch._inductor.graph as inductor
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from flashnorm_compile._torch.compilers import _layouts_for_any_batch_size

    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    images = mode.from_tensor(torch.empty(5, 3, 8, 8))
    weight = mode.from_tensor(torch.empty(6, 3, 3, 3), static_shapes=True)
    symbols = inductor.has_free_symbols
    assert symbols(images)
    with mode, _layouts_for_any_batch_size():
        batch = images.shape[0]
        assert inductor.has_free_symbols(images)
        assert not inductor.has_free_symbols(weight.new_empty(batch, 3, 8, 8))
        assert not inductor.has_free_symbols(weight)
        assert inductor.has_free_symbols(weight.new_empty(3, batch, 8, 8))
        assert inductor.has_free_symbols(batch)
    assert inductor.has_free_symbols is symbols
