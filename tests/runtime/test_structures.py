"""Answers that obey a structure, from a model that says anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

import q35c
from q35c.errors import OptionError
from q35c.runtime.structures import read_format, read_tool_choice
from tests.chatting import NOW, write_chat
from tests.fake_artifact import END, GENERATION

USER = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "on": {"type": "boolean"}},
    "required": ["n", "on"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    """A model whose every token depends on the whole past, and on the seed."""
    pytest.importorskip("llguidance", reason="the extra `serve` is not installed")
    generation = {**GENERATION, "do_sample": True, "stop_ids": [END]}
    path = tmp_path_factory.mktemp("babbler") / "m.q35c"
    write_chat(path, noise=2.0, generation=generation, context=4096)
    with q35c.load(path, threads=1) as model:
        yield model


def test_documents_obey_their_schema(babbler: q35c.Model) -> None:
    finished = 0
    for seed in range(12):
        made = babbler.chat(USER, response_format=FORMAT, thinking=False, seed=seed)
        if made.finish_reason == "stop":
            value = json.loads(made.content)
            assert set(value) == {"n", "on"}
            assert type(value["n"]) is int and type(value["on"]) is bool
            finished += 1
    assert finished > 6


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"type": "choice", "choice": ["yes", "no"]}, "yes|no"),
        ({"type": "regex", "regex": "[0-9]{3}-[a-f]"}, "[0-9]{3}-[a-f]"),
        ({"type": "grammar", "grammar": 'start: "a" "b"?'}, "ab?"),
        ({"type": "text"}, "(?s).*"),
    ],
)
def test_texts_obey_their_pattern(babbler: q35c.Model, wanted: Any, pattern: str) -> None:
    for seed in range(4):
        options = {"seed": seed, "max_new_tokens": 50, "thinking": False}
        made = babbler.chat(USER, response_format=wanted, **options)
        assert re.fullmatch(pattern, made.content), made.content
        assert babbler.chat(USER, response_format=wanted, **options).content == made.content


def test_a_structure_begins_behind_the_reasoning(babbler: q35c.Model) -> None:
    wanted = {"type": "choice", "choice": ["yes", "no"]}
    found = set()
    for seed in range(20):
        made = babbler.chat(USER, response_format=wanted, seed=seed, max_new_tokens=3000)
        assert made.content in ("", "yes", "no")
        assert made.content or made.finish_reason in ("length", "context")
        found.add(made.content != "")
        assert made.usage.reasoning_tokens > 0
    assert True in found


@pytest.mark.parametrize("choice", ["required", "now"])
def test_calls_may_be_forced(babbler: q35c.Model, choice: str) -> None:
    other = {"name": "later", "parameters": {"type": "object", "properties": {}}}
    tools = [NOW, other] if choice == "required" else [other, NOW]
    finished = 0
    for seed in range(6):
        made = babbler.chat(
            USER,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=False,
            thinking=False,
            seed=seed,
        )
        if made.finish_reason == "context":
            continue
        assert made.finish_reason == "tool_calls" and made.content == ""
        (call,) = made.tool_calls
        assert call.name == "now" if choice == "now" else call.name in ("now", "later")
        assert all(isinstance(value, str) for value in call.arguments.values())
        finished += 1
    assert finished


@pytest.mark.parametrize(
    ("wanted", "where"),
    [
        (5, "response_format"),
        ({"type": "yaml"}, "response_format.type"),
        ({}, "response_format.type"),
        ({"type": "regex"}, "response_format.regex"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": 5}, "response_format.json_schema.schema"),
    ],
)
def test_wrong_formats_are_named(wanted: Any, where: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_format(wanted)
    assert caught.value.where == where


def test_formats_of_no_structure() -> None:
    assert read_format(None) is None and read_format({"type": "text"}) is None
    made = read_format({"type": "json_object"})
    assert made is not None and made.kind == "object"


def test_what_cannot_be_enforced_is_named(babbler: q35c.Model) -> None:
    schema = {"type": "array", "uniqueItems": True}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    with pytest.raises(OptionError, match="uniqueItems") as caught:
        babbler.chat(USER, response_format=wanted)
    assert str(caught.value.where).startswith("response_format.json_schema.schema")


def test_choices_of_tools() -> None:
    schemas = {"now": {"a": 1}, "auto": {}}
    assert read_tool_choice("none", {"now": {}}) == (False, None)
    assert read_tool_choice("auto", {}) == (True, None)
    offered, wanted = read_tool_choice("required", schemas)
    assert offered and wanted is not None and wanted.value == (("now", {"a": 1}), ("auto", {}))
    assert read_tool_choice("auto", schemas)[1] is not None  # a tool of that name
    for choice, known in (("later", schemas), ("required", {}), (5, {})):
        with pytest.raises(OptionError, match="tool_choice"):
            read_tool_choice(choice, known)
