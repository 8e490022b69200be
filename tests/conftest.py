"""What holds for the whole run."""

from __future__ import annotations

import sys


def pytest_sessionfinish() -> None:
    """Clean up here, not at exit: the workers of a parallel run end without their exit handlers."""
    if compiled := sys.modules.get("tests.compiled"):
        compiled.clean_up()
