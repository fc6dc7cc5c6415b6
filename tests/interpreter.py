"""Triton's interpreter, in a process of its own: it runs kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(call: str) -> None:
    """Run ``module.function(...)`` of a test module with kernels interpreted."""
    result = subprocess.run(
        [sys.executable, "-c", f"import interpreter; interpreter.mend(); {call}"],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def mend() -> None:
    """Let loop bounds be kernel arguments.

    The interpreter of Triton 3.6 keeps them in arrays of one element, and asks NumPy for their
    int; NumPy 2.4 and later refuse.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
