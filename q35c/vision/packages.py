"""Import the packages of the extra `vision` when they are first needed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from q35c.errors import ToolchainError


def pillow(name: str = "PIL.Image") -> Any:
    """Return a module of Pillow. Raises ToolchainError where it is not installed."""
    return _module(name, "Pillow", "pictures")


def has_pillow() -> bool:
    """Say whether pictures can be opened."""
    return importlib.util.find_spec("PIL") is not None


def pyav() -> Any:
    """Return PyAV. Raises ToolchainError where it is not installed."""
    return _module("av", "av", "clips")


def _module(name: str, package: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ToolchainError(
            f"{what} need the package {package}: {error!s:.200}", hint="pip install 'q35c[vision]'"
        ) from None
