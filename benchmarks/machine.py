"""Where, with which versions and of which sources a result was measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess

import torch

ROOT = pathlib.Path(__file__).parents[1]
#: What a result depends on.
SOURCES = ("flashnorm_compile", "passes", "kernels", "benchmarks")
_LIBRARIES = ("triton", "opacus", "transformers", "peft")


def describe(device: str) -> dict[str, str]:
    """Return the device and the versions."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    else:
        found["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit, marked where sources differ from it; without git, a digest of sources."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return f"{head}+" if _git("status", "--porcelain", "--", *SOURCES) else head
    except (OSError, subprocess.CalledProcessError):
        digest = hashlib.sha256()
        for folder in SOURCES:
            for path in sorted((ROOT / folder).rglob("*.py")):
                digest.update(path.read_bytes())
        return f"sources {digest.hexdigest()[:10]}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
