"""Structures that would end the process or fill it are refused before the compiler sees them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from q35c.errors import OptionError
from q35c.runtime.grammar import Grammars
from tests.runtime.test_grammar import ADDED, grammars_with, says


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return grammars_with(*ADDED)


@pytest.mark.parametrize("number", [-(2**63), 1 - 2**63, -1e19, -(2.0**63), 2**64, 10**30])
def test_numbers_that_would_end_the_process_are_refused(grammars: Grammars, number: float) -> None:
    lark = f'start: %json {{"const": {json.dumps(number)}}}'
    interval = {"type": "integer", "minimum": number, "maximum": number}
    for kind, value in (
        ("schema", {"const": number}),
        ("schema", {"enum": ["x", [number]]}),
        ("schema", interval),
        ("schema", {"properties": {"a": {"default": number}}}),
        ("calls", (("f", {"type": "object", "properties": {"a": interval}}),)),
        ("grammar", lark),
        ("grammar", lark.replace(json.dumps(number), "-922337203685477580.8e1")),
    ):
        with pytest.raises(OptionError, match="too costly"):
            grammars.compile(kind, value)
    safe = {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991}
    assert says(grammars, "schema", safe, "-9007199254740991")


@pytest.mark.parametrize(
    ("schema", "is_cheap"),
    [
        ({"multipleOf": 0.01}, True),
        ({"properties": {"a": {"multipleOf": 0.5}, "b": {"multipleOf": 100}}}, True),
        ({"multipleOf": 123456789}, False),
        ({"multipleOf": 123.456789}, False),
        ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, False),
    ],
)
def test_multiples_are_bounded_together(grammars: Grammars, schema: Any, is_cheap: bool) -> None:
    for kind, value in (("schema", schema), ("grammar", f"start: %json {json.dumps(schema)}")):
        if is_cheap:
            grammars.compile(kind, value)
        else:
            with pytest.raises(OptionError, match="too costly"):
                grammars.compile(kind, value)


def test_a_schema_within_a_grammar_must_be_one(grammars: Grammars) -> None:
    assert says(grammars, "grammar", 'start: "a" %json {"const": 5}', "a5")
    for text in ("start: %json", 'start: %json // {"a": 1}', 'start: %json {"a"'):
        with pytest.raises(OptionError):
            grammars.compile("grammar", text)


def test_a_panic_of_the_package_is_an_error_of_the_structure(grammars: Grammars) -> None:
    # The package cuts a name for its message in the middle of a character.
    for schema in (
        {"type": "é" * 300},
        {"type": "object", "properties": {"a": {"type": "é" * 300}}},
    ):
        for kind, value in (("schema", schema), ("calls", (("f", schema),))):
            with pytest.raises(OptionError):
                grammars.compile(kind, value)
    assert says(grammars, "schema", {"type": "integer"}, "12")
