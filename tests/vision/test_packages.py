"""Without the extra's packages an error says which, and what to do."""

from __future__ import annotations

import sys

import pytest

from q35c.errors import ToolchainError
from q35c.vision.clips import clip_frames
from q35c.vision.patches import image_frame
from tests.vision.pictures import encoded, photo
from tests.vision.reference import PARAMETERS


@pytest.mark.parametrize(
    ("module", "package", "call"),
    [
        ("PIL.Image", "Pillow", lambda: image_frame(encoded(photo(), "PNG"), PARAMETERS)),
        ("av", "av", lambda: clip_frames(b"x", PARAMETERS)),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str, call: object
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ToolchainError, match=f"(?s)package {package}.*q35c\\[vision\\]"):
        call()  # type: ignore[operator]
