"""What is installed: every module, the entry points, the licence; and how it is installed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = "flashnorm_compile"
# Folders of the repository, and where they are installed.
SOURCES = {
    PACKAGE: PACKAGE,
    "passes": f"{PACKAGE}/passes",
    "kernels": f"{PACKAGE}/kernels",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """A wheel of the working tree, built in a copy of it."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=copy, check=True, capture_output=True
    )
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def modules() -> list[tuple[str, str]]:
    """Every module of the repository and its path in a wheel."""
    found = []
    for folder, installed in SOURCES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).as_posix()
            found.append((path.relative_to(ROOT).as_posix(), f"{installed}/{inside}"))
    return found


def text(wheel: zipfile.ZipFile, suffix: str) -> str:
    (name,) = [name for name in wheel.namelist() if name.endswith(suffix)]
    return wheel.read(name).decode()


def test_the_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    contents = set(wheel.namelist())
    missing = [source for source, installed in modules() if installed not in contents]
    assert not missing, (
        f"not in the wheel: {missing}. A folder without an __init__.py is not a package"
    )


def test_the_wheel_holds_nothing_else_to_import(wheel: zipfile.ZipFile) -> None:
    expected = {installed for _, installed in modules()}
    unexpected = {name for name in wheel.namelist() if name.endswith(".py")} - expected
    assert not unexpected
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {PACKAGE}


def test_the_wheel_registers_the_backend_and_the_command(wheel: zipfile.ZipFile) -> None:
    lines = text(wheel, ".dist-info/entry_points.txt").split("\n")
    sections = {
        lines[i].strip("[]"): lines[i + 1] for i in range(len(lines)) if lines[i].startswith("[")
    }
    backend = "flashnorm = flashnorm_compile.entry_point:flashnorm"
    assert sections["torch_dynamo_backends"] == backend
    assert sections["console_scripts"] == "flashnorm = flashnorm_compile.cli:main"


def test_the_wheel_carries_licence_and_type_marker(wheel: zipfile.ZipFile) -> None:
    assert f"{PACKAGE}/py.typed" in wheel.namelist()
    assert text(wheel, ".dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert "License-Expression: Apache-2.0" in text(wheel, ".dist-info/METADATA")


def test_torch_finds_the_installed_backend() -> None:
    assert "flashnorm" in torch.compiler.list_backends()
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="flashnorm")
    assert callable(entry.load())


def test_constraints_are_plain_names_and_versions() -> None:
    for line in constraint_lines():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line), line


def test_constraints_pin_everything_that_is_installed() -> None:
    pinned = {canonicalize_name(line.split("==")[0]) for line in constraint_lines()}
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["cli"], *extras["dev"]]
    needed = {name for name in dependencies(wanted) if name != PROJECT["name"]}
    assert not needed - pinned


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--help"], 0, "source setup_env.sh"),
        (["--warp"], 1, "unknown argument --warp; expected --cpu or --gpu"),
    ],
)
def test_setup_script_explains_itself(arguments: list[str], status: int, expected: str) -> None:
    result = run_setup(*arguments)
    assert result.returncode == status
    assert expected in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYTHON": "/bin/false"}, "PYTHON=/bin/false is not Python 3.11 or later"),
        ({"FLASHNORM_GPU": "yes"}, "FLASHNORM_GPU is 'yes'; expected 0 or 1"),
    ],
)
def test_setup_script_fails_loudly(variables: dict[str, str], expected: str) -> None:
    result = run_setup(**variables)
    assert result.returncode == 1
    assert expected in result.stderr


def run_setup(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "setup_env.sh"), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def dependencies(requirements: list[str]) -> set[str]:
    """The names of all distributions that requirements bring along, as far as installed."""
    found: set[str] = set()
    pending = [(Requirement(line), "") for line in requirements]
    while pending:
        requirement, extra = pending.pop()
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if name in found or (marker is not None and not marker.evaluate({"extra": extra})):
            continue
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        for line in lines:
            inner = Requirement(line)
            pending += [(inner, chosen) for chosen in {"", *requirement.extras}]
    return found
