"""What holds for the whole run."""

from __future__ import annotations

import os
import shutil
import tempfile

COMPILED = "Q35C_TESTS_COMPILED"


def pytest_configure() -> None:
    """Make one directory for the models that tests compile; the workers of a parallel run inherit it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[COMPILED] = tempfile.mkdtemp(prefix="q35c-tests-")


def pytest_unconfigure() -> None:
    """Remove it: the workers have ended."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ.pop(COMPILED), ignore_errors=True)
