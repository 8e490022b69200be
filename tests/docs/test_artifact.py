"""docs/artifact.md names every field and every layout, and no others."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from q35c.artifact.entries import INPUTS
from q35c.artifact.manifest import FORMAT, Manifest
from q35c.artifact.schema import fields_of
from q35c.config import ModelConfig
from q35c.layouts.cache import StateLayout
from q35c.layouts.rows import RowLayout
from q35c.layouts.weights import WeightLayout
from q35c.vision_config import VisionConfig

TEXT = (Path(__file__).parents[2] / "docs/artifact.md").read_text()
LAYOUTS = {"WeightLayout": WeightLayout, "StateLayout": StateLayout, "RowLayout": RowLayout}


def rows(heading: str, table: int = 0) -> list[str]:
    """Return the first column of a table in a section."""
    section = re.split(r"^#+ ", TEXT.partition(f"\n### {heading}\n")[2], flags=re.MULTILINE)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    return re.findall(r"^\| `([^`]*)` ", tables[table], flags=re.MULTILINE)


def names_of(kind: Any) -> set[str]:
    """Return the names of a `Literal`, or of a union of them."""
    if get_origin(kind) is Literal:
        return set(get_args(kind))
    return {name for part in get_args(kind) for name in names_of(part)}


def records(kind: Any) -> set[type]:
    """Return the dataclasses that a type consists of; configurations of models are described elsewhere."""
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        return {found for part in get_args(kind) for found in records(part)}
    if kind in (ModelConfig, VisionConfig):
        return set()
    return {kind}.union(*(records(part) for part in fields_of(kind).values()))


@pytest.mark.parametrize("kind", sorted(records(Manifest), key=lambda kind: kind.__name__))
def test_every_field_is_named(kind: type) -> None:
    assert rows(kind.__name__) == list(fields_of(kind))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_named(name: str) -> None:
    found = rows(name)
    assert len(found) == len(set(found)) and set(found) == names_of(LAYOUTS[name])


def test_the_io_fields_and_the_version() -> None:
    assert rows("Io", table=1) == [*INPUTS, "logits", "clock"]
    assert TEXT.startswith(f"# The artifact, format {FORMAT}\n")
    assert f"| `format` | {FORMAT} |" in TEXT
