"""The strict decoder: one type, one range, one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from q35c.artifact.schema import Items, Pattern, Range, Tag, decode, encode
from q35c.errors import ArtifactError


@dataclass(frozen=True)
class Inner:
    flag: bool


@dataclass(frozen=True)
class Round:
    form: Literal["round"]
    radius: int


@dataclass(frozen=True)
class Square:
    form: Literal["square"]
    side: int


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Range(1, 10)]
    share: Annotated[float, Range(0, 1)]
    name: Annotated[str, Pattern("[a-z]+")]
    kind: Literal["a", 1]
    inner: Inner
    many: Annotated[tuple[Inner, ...], Items(1, 2)]
    table: Annotated[Mapping[str, int], Items(0, 2, "[a-z]")]
    either: int | str
    shape: Annotated[Round | Square, Tag("form")]


GOOD: dict[str, Any] = {
    "count": 3,
    "share": 0.5,
    "name": "abc",
    "kind": "a",
    "inner": {"flag": True},
    "many": [{"flag": False}],
    "table": {"x": 1},
    "either": "text",
    "shape": {"form": "square", "side": 2},
}
BAD: list[tuple[str, Any, str]] = [
    ("count", True, "$.count"),
    ("count", 0, "$.count"),
    ("count", 11, "$.count"),
    ("count", 3.0, "$.count"),
    ("count", "3", "$.count"),
    ("count", None, "$.count"),
    ("share", True, "$.share"),
    ("share", 1.0001, "$.share"),
    ("share", float("nan"), "$.share"),
    ("share", float("inf"), "$.share"),
    ("name", "", "$.name"),
    ("name", "abc\n", "$.name"),
    ("name", 5, "$.name"),
    ("kind", True, "$.kind"),
    ("kind", 1.0, "$.kind"),
    ("kind", "b", "$.kind"),
    ("kind", [], "$.kind"),
    ("inner", [], "$.inner"),
    ("inner", {}, "$.inner.flag"),
    ("inner", {"flag": 1}, "$.inner.flag"),
    ("inner", {"flag": True, "more": 1}, "$.inner.'more'"),
    ("many", [], "$.many"),
    ("many", {}, "$.many"),
    ("many", [{"flag": True}] * 3, "$.many"),
    ("many", [{"flag": True}, {"flag": 0}], "$.many[1].flag"),
    ("table", [], "$.table"),
    ("table", {"x": "1"}, "$.table.x"),
    ("table", {"xy": 1}, "$.table"),
    ("table", {"x": 1, "y": 1, "z": 1}, "$.table"),
    ("either", 1.5, "$.either"),
    ("either", False, "$.either"),
    ("shape", {"form": "square", "radius": 2}, "$.shape.side"),
    ("shape", {"form": "round", "radius": "2"}, "$.shape.radius"),
    ("shape", {"form": "flat"}, "$.shape.form"),
    ("shape", {"form": 1, "side": 2}, "$.shape.form"),
    ("shape", {"form": ["square"], "side": 2}, "$.shape.form"),
    ("shape", {"side": 2}, "$.shape.form"),
    ("shape", "square", "$.shape"),
]


def test_round_trip() -> None:
    decoded = decode(Outer, GOOD, "$")
    assert decoded.many == (Inner(False),) and encode(decoded) == GOOD
    assert decoded.shape == Square("square", 2)


def test_an_integer_may_stand_for_a_real_number() -> None:
    share = decode(Outer, {**GOOD, "share": 1}, "$").share
    assert type(share) is float and share == 1.0


@pytest.mark.parametrize(("name", "value", "place"), BAD)
def test_refused_with_its_place(name: str, value: Any, place: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        decode(Outer, {**GOOD, name: value}, "$")
    assert caught.value.where == f"manifest at {place}"


@pytest.mark.parametrize("name", GOOD)
def test_missing_field(name: str) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        decode(Outer, {key: value for key, value in GOOD.items() if key != name}, "$")


def test_unknown_field_and_wrong_whole() -> None:
    with pytest.raises(ArtifactError, match="unknown"):
        decode(Outer, {**GOOD, "more": 1}, "$")
    for value in ([], "x", None, 5):
        with pytest.raises(ArtifactError, match="object is required"):
            decode(Outer, value, "$")
