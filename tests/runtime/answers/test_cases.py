"""Recorded answers: whole, cut at every place, and cut at random ones."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from q35c.errors import OptionError
from q35c.runtime.chat.answer import AnswerParser, CallArguments, ContentDelta, ReasoningDelta
from tests.runtime.answers.reading import CASES, TOOLS, Read, read, read_case

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])


@each_case
def test_an_answer_is_taken_apart(case: dict[str, Any]) -> None:
    made = read_case(case, [case["text"]])
    calls = [(call["name"], call["arguments"]) for call in case["calls"]]
    assert (made.reasoning, made.content or None) == (case["reasoning"], case["content"])
    assert repr(made.arguments) == repr(calls)  # True is no 1, and 42.0 no 42


@each_case
def test_no_cut_changes_an_answer(case: dict[str, Any]) -> None:
    text = case["text"]
    whole = read_case(case, [text])
    assert read_case(case, text) == whole
    for at in range(len(text) + 1):
        assert read_case(case, [text[:at], text[at:]]) == whole, at


@each_case
def test_no_cuts_change_an_answer(case: dict[str, Any]) -> None:
    check_random_cuts(case, 10)


@pytest.mark.nightly
@each_case
def test_no_cuts_change_an_answer_at_all(case: dict[str, Any]) -> None:
    check_random_cuts(case, 1000)


def check_random_cuts(case: dict[str, Any], times: int) -> None:
    text = case["text"]
    whole = read_case(case, [text])
    for seed in range(times):
        pieces = cut(text, random.Random(seed))
        assert read_case(case, pieces) == whole, (seed, pieces)


def cut(text: str, chance: random.Random) -> list[str]:
    """Return a text in random pieces, some of them empty."""
    count = chance.randint(2, 30)
    places = sorted(chance.choices(range(len(text) + 1), k=count))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def test_text_is_said_as_it_arrives() -> None:
    """Only the beginning of a tag, and a newline that may be the last, wait for what follows."""
    parser = AnswerParser(TOOLS, is_thinking=True)
    for text in ("word", " a < b", "\nnext"):
        assert parser.feed(text) == [ReasoningDelta(text)]
    assert parser.feed("\n</thi") == []
    assert parser.feed("nk>\n\nHello <tool_cal") == [ContentDelta("Hello ")]
    assert parser.feed("m>") == [ContentDelta("<tool_calm>")]
    parser.feed("<tool_call>\n<function=write>\n<parameter=content>\n")
    begun = '"'
    for text in ("def", " f():\n    ", "x < y", '"'):
        assert parser.feed(text)[-1] == CallArguments(0, begun + json.dumps(text)[1:-1])
        begun = ""
    assert parser.feed("\n</par") == []
    assert parser.feed("t") == [CallArguments(0, "\\n</part")]


def test_the_beginning_of_a_call_is_no_content_of_an_answer_that_was_cut_off() -> None:
    text = "so\n\n<tool_call>\n<function=wri"
    assert read([text], TOOLS, False, is_cut=True).content == "so\n\n"
    assert read([text], TOOLS, False, is_cut=False).content == text


def test_functions_are_tools() -> None:
    def double(number: int) -> int:
        """Double a number.

        Args:
            number: what to double
        """
        return 2 * number

    text = "<tool_call>\n<function=double>\n<parameter=number>\n4\n</parameter>\n</function>\n</tool_call>"
    assert read([text], [double], False).arguments == [("double", {"number": 4})]
    wrapped = [{"type": "function", "function": {"name": "double", "parameters": None}}]
    assert read([text], wrapped, False).arguments == [("double", {"number": "4"})]


def test_tools_have_names() -> None:
    with pytest.raises(OptionError, match=r"tools\[1\]"):
        AnswerParser([TOOLS[0], {"type": "function", "function": {}}])


TAGS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=write>", "<function=now>", "<function=rm>",
    "</function>", "<parameter=path>", "<parameter=content>", "<parameter=new>", "</parameter>", "\n", "\n\n", " ",
    "text", "<", "</", "null", '"', "\\", "é", "😀",
]  # fmt: skip


def check_random_answer(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choices(TAGS, k=chance.randint(1, 40)))
    if chance.random() < 0.5:
        head = "<tool_call>\n<function=write>\n<parameter=path>\n"
        text = head + text + "\n</parameter>\n</function>\n</tool_call>" + text[::-1]
    is_thinking, is_cut = chance.random() < 0.5, chance.random() < 0.3
    whole = read([text], TOOLS, is_thinking, is_cut)
    assert read(text, TOOLS, is_thinking, is_cut) == whole, (seed, text)
    for _ in range(5):
        pieces = cut(text, chance)
        assert read(pieces, TOOLS, is_thinking, is_cut) == whole, (seed, text, pieces)
    assert isinstance(whole, Read) and all(isinstance(v, dict) for _, v in whole.arguments)


def test_random_tags_read_the_same_in_all_pieces() -> None:
    for seed in range(500):
        check_random_answer(seed)


@pytest.mark.nightly
def test_many_random_tags_read_the_same_in_all_pieces() -> None:
    for seed in range(500, 10_000):
        check_random_answer(seed)
