"""What holds for the whole run."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile

import pytest

COMPILED = "Q35C_TESTS_COMPILED"


def pytest_configure() -> None:
    """Make one directory for the models that tests compile; the workers of a parallel run inherit it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[COMPILED] = tempfile.mkdtemp(prefix="q35c-tests-")


def pytest_unconfigure() -> None:
    """Remove it: the workers have ended."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ.pop(COMPILED), ignore_errors=True)


@pytest.fixture(scope="session")
def spared_modules() -> None:
    """Spare collections of garbage all that was imported, for tests that ask for many of them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make what runs at night slow as well: `-m "not slow"` replaces the `-m` of pyproject, and leaves both out."""
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")
