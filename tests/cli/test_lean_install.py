"""A compiled model runs in an environment that has neither torch nor TVM."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import q35c
from tests.compiled import artifact

# The dependencies in pyproject.toml, and what jinja2 needs.
LEAN_PACKAGES = ("numpy", "click", "tokenizers", "jinja2", "markupsafe")


@pytest.fixture(scope="module")
def lean_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of a new virtual environment that sees the lean packages only."""
    home = tmp_path_factory.mktemp("lean")
    command = [sys.executable, "-m", "venv", "--without-pip", str(home)]
    subprocess.run(command, check=True)
    packages = next(home.glob("lib/python*/site-packages"))
    for name in LEAN_PACKAGES:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
        for top in tops:
            (packages / top).symlink_to(str(distribution.locate_file(top)))
    (packages / "q35c").symlink_to(Path(q35c.__file__).parent)
    return home / "bin" / "python"


def run_lean(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "q35c", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=python.parent)


def test_the_lean_packages_are_those_declared() -> None:
    declared = importlib.metadata.requires("q35c") or []
    names = {line.partition(">")[0] for line in declared if "extra ==" not in line}
    assert names == set(LEAN_PACKAGES) - {"markupsafe"}


def test_the_environment_has_no_compiler(lean_python: Path) -> None:
    for name in ("torch", "transformers", "tvm", "tvm_ffi", "safetensors"):
        child = subprocess.run([str(lean_python), "-c", f"import {name}"], capture_output=True)
        assert child.returncode == 1, name


def test_it_generates_the_same_text(lean_python: Path) -> None:
    path = artifact("moe")
    options = {"max_new_tokens": 12, "temperature": 0.0}
    with q35c.load(path) as model:
        expected = model.generate("the thin house", **options)
    lean = run_lean(lean_python, "generate", path, "the thin house", "-n", 12, "--temperature", 0)
    assert lean.returncode == 0, lean.stderr
    assert lean.stdout == expected.text + "\n"


@pytest.mark.parametrize("command", ["compile", "verify", "export"])
def test_compiling_says_what_is_missing(lean_python: Path, command: str) -> None:
    arguments = [artifact("moe")] if command == "verify" else []
    lean = run_lean(lean_python, command, *arguments, "some-model")
    assert lean.returncode == 1
    assert "pip install 'q35c[" in lean.stderr
    assert "Traceback" not in lean.stderr
