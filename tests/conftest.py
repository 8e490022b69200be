"""What holds for the whole run."""

from __future__ import annotations

import os
import shutil
import sys
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make what runs at night slow as well: `-m "not slow"` replaces the `-m` of pyproject, and leaves both out."""
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Make kernels faster to parse, where any of what was collected may have some."""
    if "tvm" in sys.modules:
        from tests.quick_parser import install

        install()
