"""What only a process of its own can show: the environment, and caches on disk."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


def run(common: str, code: str, cache: Path, **environment: str) -> tuple[str, str]:
    """Run a script beside the tests in a fresh process; return its output and its log."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(common) + textwrap.dedent(code)],
        cwd=TESTS,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


STEP = """
    import torch
    import flashnorm_compile as fn

    OPTIONS = {
        "max_grad_norm": 1.0,
        "noise_multiplier": 0.0,
        "expected_batch_size": 4,
        "lowering": "eager",
    }

    def step(model, x):
        loss = model(x).square().mean()
        loss.backward()

    model = torch.nn.Linear(3, 2)
"""


def test_disabled_dynamo_is_refused_by_name(tmp_path):
    """torch.compile would return the function as it is, whatever the backend."""
    code = """
        try:
            torch.compile(step, backend="flashnorm", options=OPTIONS)
        except fn.PrivacyError as error:
            print(error)
    """
    printed, _ = run(STEP, code, tmp_path, TORCHDYNAMO_DISABLE="1")
    assert "Dynamo is switched off" in printed


@pytest.mark.skipif(torch.__version__ >= "2.15", reason="torch compiles its own modules in place")
def test_the_first_module_that_would_not_be_compiled_is_refused(tmp_path):
    """The backend is loaded in the middle of ``module.compile``."""
    code = """
        for _ in range(2):
            try:
                torch.nn.Sequential(model).compile(backend="flashnorm", options=OPTIONS)
            except fn.PrivacyError as error:
                print(error)
        torch.compile(step, backend="flashnorm", options=OPTIONS)
    """
    printed, _ = run(STEP, code, tmp_path)
    assert printed.count("does not compile Sequential.forward") == 2


def test_logger_calls_do_not_split_the_graph(tmp_path):
    """By the backend's name too, and only there: other functions go on logging."""
    code = """
        import logging

        def logs(model, x):
            logging.getLogger("somewhere").warning("called")
            step(model, x)

        torch.compile(logs, backend="flashnorm", options=OPTIONS)(model, torch.randn(4, 3))
        print("private")
        torch.compile(logs, backend="eager")(model, torch.randn(4, 3))
    """
    printed, logged = run(STEP, code, tmp_path)
    assert printed == "private\n"
    assert logged.splitlines().count("called") == 1


TRAIN = """
    import torch
    import flashnorm_compile as fn

    def step(model, x):
        loss = model(x).square().mean()
        loss.backward()

    def run(**options):
        torch.manual_seed(0)
        model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
        defaults = {"max_grad_norm": 0.1, "noise_multiplier": 0.0, "expected_batch_size": 4}
        compiled = torch.compile(step, backend="flashnorm", options=defaults | options)
        compiled(model, x)
        return model.weight.grad.norm().item()
"""
RAW = """
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    torch.compile(step)(model, x)
    print(model.weight.grad.norm().item())
"""


def clipped(max_grad_norm: float) -> float:
    """The norm of the weight's gradient, by a loop over samples."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    total = torch.zeros(2, 3)
    for sample in x:
        grads = torch.autograd.grad(model(sample).square().mean(), [*model.parameters()])
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        total += grads[0] * min(1.0, max_grad_norm / (norm.item() + 1e-6))
    return (total / len(x)).norm().item()


def test_no_stale_graph_in_a_second_process(tmp_path):
    """It finds the cache of the first, and gets the graph that it asks for.

    The first has compiled the step without privacy, by our passes, and with passes that are not
    ours. What is looked up must be the graph that the passes made, not the user's function.
    """
    other_passes = """
        from flashnorm_compile.passes import pipeline

        torch._dynamo.reset()
        print(run())

        insert_clipping = pipeline.insert_clipping

        def doubled(*args):
            context, before = args[-2:]
            norms, weights = insert_clipping(*args)
            return norms, context.emit(lambda weights: 2 * weights, weights, before=before)

        pipeline.insert_clipping = doubled
        torch._dynamo.reset()
        print(run())
    """
    ours = """
        print(run())
        torch._dynamo.reset()
        print(run(max_grad_norm=0.05, strategy="materialize"))
    """
    near = functools.partial(pytest.approx, rel=1e-5)
    first = numbers(TRAIN + RAW, other_passes, tmp_path)
    assert first == near([clipped(float("inf")), clipped(0.1), 2 * clipped(0.1)])
    assert numbers(TRAIN, ours, tmp_path) == near([clipped(0.1), clipped(0.05)])


def numbers(common: str, code: str, cache: Path) -> list[float]:
    printed, _ = run(common, code, cache, TORCHINDUCTOR_AUTOGRAD_CACHE="1")
    return [float(line) for line in printed.split()]
