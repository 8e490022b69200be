"""Structured answers: what a grammar allows token by token, what is refused by name, and what would cost too much."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from q35c.errors import OptionError, ToolchainError
from q35c.runtime.grammar import Grammars, Matcher
from q35c.runtime.tokenizer import Tokenizer
from tests.fake_artifact import END, IM_END, tokenizer

pytest.importorskip("llguidance", reason="the extra `serve` is not installed")
VOCAB = 300  # more than the tokenizer has
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def grammars_with(*added: str) -> Grammars:
    """Return a compiler for the fake's bytes, with some tokens behind its two special ones."""
    backend = Backend.from_str(tokenizer().decode())
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return Grammars(Tokenizer(backend.to_str().encode()), VOCAB, (IM_END, END))


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return grammars_with(*ADDED)


def allowed(matcher: Matcher) -> set[int]:
    mask = matcher.mask()
    assert mask.dtype == np.uint32 and len(mask) == -(-VOCAB // 32)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def follow(grammars: Grammars, matcher: Matcher, text: str) -> bool:
    """Walk along a text by tokens that are allowed; say whether it got to the end, and may end there."""
    for token in grammars.tokenizer.encode(text):
        if token not in allowed(matcher):
            return False
        matcher.accept(token)
    return matcher.is_complete


def says(grammars: Grammars, kind: str, value: Any, text: str, **options: Any) -> bool:
    return follow(grammars, grammars.compile(kind, value, **options).matcher(), text)


@pytest.mark.parametrize(
    ("kind", "value", "right", "wrong"),
    [
        ("object", None, ['{"a": [1, null]}', "{}"], ["[1]", '"a"', "{} {}"]),
        ("schema", {"type": "integer"}, ["12", "-3"], ["1.5", "x", ""]),
        ("schema", True, ["12", '"a"', "[]"], ["x"]),
        ("schema", {"enum": ["a", 1]}, ['"a"', "1"], ['"b"', "2"]),
        (
            "schema",
            {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
            ['{"n": 1}'],
            ["{}", '{"n": "1"}'],
        ),
        ("regex", r"[a-c]+/\d", ["ab/7"], ["ab7", "d/7"]),
        ("choice", ("yes", 'n"o\n', "né"), ["yes", 'n"o\n', "né"], ["ye", "no", "yess"]),
        ("grammar", 'start: "x" y\ny: /[0-9]+/', ["x12"], ["x", "12"]),
    ],
)
def test_kinds(
    grammars: Grammars, kind: str, value: Any, right: list[str], wrong: list[str]
) -> None:
    for text in right:
        assert says(grammars, kind, value, text), text
        assert says(grammars, kind, value, f"think\n</think>\n\n{text}", is_thinking=True), text
    for text in wrong:
        assert not says(grammars, kind, value, text), text
        assert not says(grammars, kind, value, f"</think>\n\n{text}", is_thinking=True), text


def test_a_complete_answer_ends(grammars: Grammars) -> None:
    matcher = grammars.compile("choice", ("ab", "abc")).matcher()
    for byte in b"ab":
        assert not allowed(matcher) & {END, IM_END}
        matcher.accept(byte)
    assert allowed(matcher) == {ord("c"), END, IM_END}
    matcher.accept(ord("c"))
    assert allowed(matcher) == {END, IM_END}
    matcher.accept(IM_END)


def test_each_row_has_a_matcher_of_its_own(grammars: Grammars) -> None:
    constraint = grammars.compile("choice", ("ab", "cd"))
    first, second = constraint.matcher(), constraint.matcher()
    first.accept(ord("a"))
    assert allowed(first) == {ord("b")} and allowed(second) == {ord("a"), ord("c")}
    with pytest.raises(OptionError, match="cannot be followed"):
        first.accept(ord("d"))
    with pytest.raises(OptionError):
        first.mask()
    second.accept(ord("c"))


def test_reasoning_is_free_but_does_not_end_the_answer(grammars: Grammars) -> None:
    matcher = grammars.compile("choice", ("x",), is_thinking=True).matcher()
    close = grammars.tokenizer.token_id("</think>")
    for byte in b'some "thoughts"':
        assert allowed(matcher) == set(range(VOCAB)) - {END, IM_END}
        matcher.accept(byte)
    matcher.accept(close)
    assert allowed(matcher) == {ord("x"), ord("\n")} and not matcher.is_complete


@pytest.mark.parametrize("added", [ADDED, ()], ids=["token", "bytes"])
def test_a_budget_closes_reasoning(added: tuple[str, ...]) -> None:
    grammars = grammars_with(*added)
    for budget in (0, 3):
        constraint = grammars.compile("choice", ("x",), is_thinking=True, thinking_tokens=budget)
        matcher = constraint.matcher()
        for _ in range(budget):
            matcher.accept(ord("t"))
        closing = grammars.tokenizer.encode("</think>")
        for token in closing:
            assert allowed(matcher) == {token}
            matcher.accept(token)
        assert follow(grammars, matcher, "\n\nx")


def test_reasoning_that_ends_by_its_letters() -> None:
    grammars = grammars_with()
    assert says(grammars, "choice", ("x",), "a </thi </think>x", is_thinking=True)
    assert not says(grammars, "choice", ("x",), "a </thi nk>x", is_thinking=True)


SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "count": {"$ref": "#/$defs/n"},
        "mode": {"enum": ["r", "w"]},
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "any": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["path", "count"],
    "$defs": {"n": {"type": "integer"}},
}
TOOLS = (("read", SCHEMA), ("now", None))


def call(name: str, **values: str) -> str:
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


RIGHT = [
    call("now"),
    call("read", path="a b\n  c", count="12"),
    call("read", path="", count="-1", mode="w", tags='["x"]', any="{text"),
    call("read", path="</parameter>\nin it", count="1", any="null"),
    f"{call('now')}\n{call('now')}",
]
WRONG = [
    "",
    "text",
    call("write"),
    call("read", path="a"),
    call("read", count="1", path="a"),
    call("read", path="a", count="many"),
    call("read", path="a", count="1", mode="x"),
    call("read", path="a", count="1", tags="text"),
    call("read", path="a", count="1", more="1"),
    call("now") + call("now"),
    call("now")[:-1],
]


@pytest.mark.parametrize("added", [ADDED, ()], ids=["token", "bytes"])
def test_forced_calls(added: tuple[str, ...]) -> None:
    grammars = grammars_with(*added)
    for text in RIGHT:
        assert says(grammars, "calls", TOOLS, text), text
        assert says(grammars, "calls", TOOLS, f"so\n</think>\n\n{text}", is_thinking=True), text
    for text in WRONG:
        assert not says(grammars, "calls", TOOLS, text), text
    assert says(grammars, "calls", TOOLS, RIGHT[0], is_parallel=False)
    assert not says(grammars, "calls", TOOLS, RIGHT[-1], is_parallel=False)


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"not": {}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"$ref": "http://example.invalid/x"}, "example.invalid"),
    ],
)
def test_what_cannot_be_enforced_is_named(grammars: Grammars, schema: Any, word: str) -> None:
    with pytest.raises(OptionError, match="cannot be enforced") as caught:
        grammars.compile("schema", schema, where="response_format")
    assert word in str(caught.value) and caught.value.where == "response_format"
    assert "start:" not in str(caught.value)
    if "$ref" not in schema:  # in a tool's schema it does not matter
        grammars.compile("calls", [("f", {"properties": {"a": schema}})])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("schema", {"type": "int"}),
        ("schema", {"type": "string", "pattern": "("}),
        ("schema", {"properties": 5}),
        ("schema", False),
        ("schema", 5),
        ("schema", "integer"),
        ("schema", {"a": {1, 2}}),
        ("regex", "("),
        ("regex", "(?<=x)a"),
        ("regex", ""),
        ("regex", 5),
        ("choice", ()),
        ("choice", ("a", 1)),
        ("choice", "ab"),
        ("grammar", "start: nope"),
        ("grammar", "garbage!!"),
        ("calls", ()),
        ("calls", [("f\n</function>", None)]),
        ("calls", [("f", {"properties": {"a": {"type": "int"}}})]),
        ("calls", [("f", {"properties": {"a": {"type": "string", "pattern": "(?<=x)"}}})]),
        ("calls", [("f", {"properties": {"a>\n": {}}})]),
        ("calls", [("f", {"properties": []})]),
        ("calls", [("f", {"type": "string"})]),
        ("calls", [("f", {"required": "a"})]),
        ("xml", None),
    ],
    ids=str,
)
def test_malformed_structures(grammars: Grammars, kind: str, value: Any) -> None:
    with pytest.raises(OptionError):
        grammars.compile(kind, value)
    assert says(grammars, "schema", {"type": "integer"}, "1")  # it has broken nothing


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("schema", {"enum": [f"v{i}" for i in range(100_000)]}),
        ("schema", {"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}),
        ("schema", {"type": "object", "properties": {f"p{i}": True for i in range(501)}}),
        ("schema", nested(2000)),
        ("schema", {"description": "x" * (64 << 10)}),
        ("regex", "a" * 10_001),
        ("choice", ["x" * 1000] * 100),
        ("grammar", "x" * (65 << 10)),
        ("calls", [("f", nested(40))]),
        ("calls", [(f"f{i}", None) for i in range(257)]),
    ],
    ids=range(10),
)
def test_what_costs_too_much_is_refused_before_it_is_compiled(
    grammars: Grammars, kind: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grammars, "make_matcher", None)
    with pytest.raises(OptionError):
        grammars.compile(kind, value)


def test_expensive_patterns_end_by_themselves(grammars: Grammars) -> None:
    for pattern in ("^(a+)+$", "((a*)*)*b", "^.*a.{30}$"):
        matcher = grammars.compile("regex", pattern.strip("^$")).matcher()
        try:
            for _ in range(100):
                assert ord("a") in allowed(matcher)
                matcher.accept(ord("a"))
        except OptionError as error:
            assert "cannot be followed" in str(error)


@pytest.mark.parametrize("seed", range(6))
def test_random_walks_make_valid_documents(grammars: Grammars, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 99},
            "b": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
            "c": {"type": ["string", "null"], "maxLength": 4},
        },
        "required": ["a", "b", "c"],
        "additionalProperties": False,
    }
    rng, matcher, ids = (
        np.random.default_rng(seed),
        grammars.compile("schema", schema).matcher(),
        [],
    )
    for _ in range(3000):
        token = int(rng.choice(sorted(allowed(matcher))))
        matcher.accept(token)
        if token in (END, IM_END):
            break
        ids.append(token)
    document = json.loads(bytes(ids).decode("utf-8", "replace"))
    assert set(document) == {"a", "b", "c"} and 0 <= document["a"] <= 99
    assert set(document["b"]) <= {"x", "y"} and len(document["b"]) <= 3


_WITHOUT = """
import sys
sys.modules["llguidance"] = None
import q35c.runtime.grammar as grammar
from q35c.errors import ToolchainError
try:
    grammar.Grammars(None, 300, ()).compile("object", None)
except ToolchainError as error:
    assert "q35c[serve]" in str(error), error
else:
    raise AssertionError
"""


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


@pytest.mark.parametrize("indent", [None, 2, 4])
def test_documents_may_be_indented_but_not_padded(grammars: Grammars, indent: int | None) -> None:
    value = {"a": [1, {"b": []}], "c": "x"}
    for kind, schema in (("object", None), ("schema", {"type": "object"})):
        text = json.dumps(value, indent=indent)
        assert says(grammars, kind, schema, text)
        assert not says(grammars, kind, schema, text.replace(": ", ":  "))


def test_without_the_package() -> None:
    child = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert issubclass(ToolchainError, Exception)
