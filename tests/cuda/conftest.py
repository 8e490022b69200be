"""The emulated driver in the place of libcuda, for every test here that asks for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from q35c.runtime.cuda.driver import LIBRARY
from tests.cuda.emulated import Emulated, host_driver


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    """Let models be loaded on the emulated device; at the end nothing may be taken."""
    driver = Emulated(host_driver())
    driver.recover()
    monkeypatch.setenv(LIBRARY, str(driver.path))
    yield driver
    gc.collect()
    taken = driver.taken()
    driver.recover()
    assert taken == {}
