"""The command line with a device: `--device`, what is said of it, and what is said where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from q35c.runtime.cuda.driver import LIBRARY
from tests.cli.conftest import SAYING, Run, run
from tests.cuda.emulated import Emulated
from tests.cuda.fake_cuda import write_fake_cuda
from tests.fake_artifact import script

__all__ = ["run"]  # a fixture


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speaker") / "speaker.q35c"
    write_fake_cuda(path, bigram=script(SAYING))
    return path


def test_text_is_generated_on_the_device(speaker: Path, emulated: Emulated, run: Run) -> None:
    for arguments in ((), ("--device", "cuda:0")):
        done = run("generate", speaker, "Th", *arguments)
        assert (done.exit_code, done.stdout) == (0, "e quick\n"), done.output
        assert "cuda:0 (emulated device, GPU-e0e0e0e0" in done.stderr
    done = run("bench", speaker, "-p", 20, "-n", 2, "-r", 1, "--json")
    assert "emulated device" in json.loads(done.stdout)["machine"]


def test_what_a_device_cannot_do_is_said(speaker: Path, emulated: Emulated, run: Run) -> None:
    done = run("bench", speaker, "--roofline")
    assert done.exit_code == 1
    assert "has no probes" in done.stderr
    done = run("generate", speaker, "Th", "--device", "cpu")
    assert done.exit_code == 1
    assert "--device" in done.stderr and "--target cpu" in done.stderr


def test_without_a_driver_it_is_said_what_to_do(speaker: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv(LIBRARY, "/nowhere/libcuda.so.1")
    done = run("generate", speaker, "Th")
    assert done.exit_code == 1
    assert "there is no NVIDIA driver on this machine" in done.stderr
    assert "--target cpu" in done.stderr
    assert run("inspect", speaker).exit_code == 0
