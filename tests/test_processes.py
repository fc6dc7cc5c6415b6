"""What only a process of its own can show: the environment, and caches on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

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
