from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _collections_are_quick(spared_modules: None) -> None:
    """Tests here ask what is left when nobody holds it any more."""
