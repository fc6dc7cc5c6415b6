"""What only a process of its own can show: the environment, and caches on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).parent


def run(code: str, cache: Path, **environment: str) -> str:
    """Run a script beside the tests in a fresh process; return what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=TESTS,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


STEP = """
    import torch
    import flashnorm_compile as fn

    OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "expected_batch_size": 4}

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
    printed = run(textwrap.dedent(STEP) + textwrap.dedent(code), tmp_path, TORCHDYNAMO_DISABLE="1")
    assert "Dynamo is switched off" in printed
