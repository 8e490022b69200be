"""Structured answers through the engine: valid whatever the model would say, and faults of one row are its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

import q35c
from q35c.errors import OptionError
from q35c.serve.engine import Engine
from q35c.serve.request import Failed, Structure
from tests.fake_artifact import END, IM_END, write_fake
from tests.serve.talk import ask, request

pytest.importorskip("llguidance", reason="the extra `serve` is not installed")
STOPS = (END, IM_END)
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["n", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    place = tmp_path_factory.mktemp("structure") / "m.q35c"
    write_fake(place, context=2048)
    with q35c.load(place, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def engine(model: q35c.Model) -> Iterator[Engine]:
    made = Engine(model)
    yield made
    made.close()


def test_documents_are_valid_whatever_the_model_says(engine: Engine) -> None:
    constraint = engine.compile(Structure("schema", SCHEMA, "response_format"))
    requests = [
        request([1], 1500, temperature=2.0, seed=i, stop_ids=STOPS, constraint=constraint)
        for i in range(20)
    ]
    for answer in ask(engine, *requests):
        assert answer.last.reason == "stop"
        document = json.loads(answer.text)
        assert set(document) == {"n", "tags"} and 0 <= document["n"] <= 999
    assert engine.statistics().grammar_seconds > 0


def test_reasoning_then_a_forced_call(engine: Engine) -> None:
    tools = (("look", {"properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}}}),)
    structure = Structure("calls", tools, "tools", True, False, thinking_tokens=20)
    constraint = engine.compile(structure)
    requests = [
        request([1], 1500, temperature=1.0, seed=i, stop_ids=STOPS, constraint=constraint)
        for i in range(5)
    ]
    form = (
        r"\n{0,2}<tool_call>\n<function=look>\n(<parameter=n>\n\s*\d+\s*\n</parameter>\n)?"
        r"</function>\n</tool_call>"
    )
    for answer in ask(engine, *requests):
        assert answer.last.reason == "stop"
        thoughts, end, said = answer.text.partition("</think>")
        assert end and re.fullmatch(form, said), said
        assert len(thoughts.encode()) >= 1


def test_constrained_and_free_rows_do_not_see_each_other(engine: Engine) -> None:
    constraint = engine.compile(Structure("choice", ("abc", "xyz"), "choice"))
    bound = request([1], 9, stop_ids=STOPS, constraint=constraint, seed=4, temperature=1.0)
    free = [request([2], 30, seed=i, temperature=1.0) for i in range(3)]
    alone = [ask(engine, item)[0].ids for item in (bound, *free)]
    answers = ask(engine, bound, *free)
    assert [answer.ids for answer in answers] == alone
    assert answers[0].text in ("abc", "xyz")


def test_a_grammar_that_gives_up_fails_its_row(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraint = engine.compile(Structure("regex", "[a-z]+", "regex"))
    start = constraint.matcher()

    def give_up() -> None:
        raise OptionError("the structure cannot be followed", where="regex")

    monkeypatch.setattr(start, "_check", give_up)
    monkeypatch.setattr(constraint, "matcher", lambda: start)
    good, bad = ask(engine, request([1], 20), request([1], 20, constraint=constraint))
    assert len(good.ids) == 20
    assert isinstance(bad.last, Failed) and isinstance(bad.last.error, OptionError)


def test_structures_are_checked(engine: Engine, tmp_path: object) -> None:
    with pytest.raises(OptionError) as caught:
        engine.compile(Structure("schema", {"uniqueItems": True}, "response_format"))
    assert caught.value.where == "response_format"
    with pytest.raises(OptionError):
        engine.compile({"kind": "object"})  # pyright: ignore[reportArgumentType]


def test_without_a_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("structure") / "n.q35c"
    write_fake(place, segments={})
    with q35c.load(place, threads=1) as model:
        engine = Engine(model)
        with pytest.raises(OptionError, match="tokenizer"):
            engine.compile(Structure("object", None, "response_format"))
        (answer,) = ask(engine, request([1], 5))
        assert len(answer.ids) == 5 and answer.text == ""
        engine.close()
