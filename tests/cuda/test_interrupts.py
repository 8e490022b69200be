"""After an exception of a signal handler, at any instant, a model on a device and its sessions go on with the right bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from q35c.runtime.cuda.driver import LIBRARY
from tests.cuda.emulated import host_driver
from tests.cuda.fake_cuda import write_fake_cuda
from tests.runtime.test_interrupts import interrupt


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_fake_cuda(tmp_path / "m.q35c")
    monkeypatch.setenv(LIBRARY, str(host_driver()))
    return tmp_path / "m.q35c"


def test_interrupts_at_random(path: Path) -> None:
    assert interrupt(path, "random", 1, 100) == 100


def test_interrupts_at_every_look_for_signals(path: Path) -> None:
    assert interrupt(path, "every", 1, 150) > 300


@pytest.mark.nightly
def test_interrupts_everywhere(path: Path) -> None:
    assert interrupt(path, "every", 1, 5) > 3000
