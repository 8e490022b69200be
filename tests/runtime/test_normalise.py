"""Conversations as clients send them, in the form that templates take."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from q35c.errors import OptionError
from q35c.runtime.chat import render_chat
from q35c.runtime.chat.normalise import normalise
from tests.chat_templates import FAMILY

USER = {"role": "user", "content": "hi"}


def parts(*texts: str, kind: str = "text") -> list[dict[str, Any]]:
    return [{"type": kind, "text": text} for text in texts]


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", **fields}


def called(given: Any, **fields: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": given}}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], [USER]),
        ([{"role": "user", "content": parts("a", "b")}], [{"role": "user", "content": "ab"}]),
        ([{"role": "user", "content": ["a", {"text": "b"}]}], [{"role": "user", "content": "ab"}]),
        (
            [{"role": "developer", "content": parts("a", "b", kind="input_text")}, USER],
            [{"role": "system", "content": "a\n\nb"}, USER],
        ),
        (
            [{"role": "developer", "content": "a"}, {"role": "system", "content": "b"}, USER],
            [{"role": "system", "content": "a\n\nb"}, USER],
        ),
        (
            [USER, {"role": "system", "content": "late"}, USER],
            [USER, {"role": "user", "content": "late"}, USER],
        ),
        (
            [{"role": "system", "content": parts("x-anthropic-billing-header: cch=1;", "a")}, USER],
            [{"role": "system", "content": "a"}, USER],
        ),
        ([{"role": "system", "content": "x-anthropic-billing-header: x"}, USER], [USER]),
        ([USER, {"role": "system", "content": ""}], [USER]),
        (
            [assistant(tool_calls=[called('{"a": [1, "x"]}')])],
            [assistant(tool_calls=[called({"a": [1, "x"]})])],
        ),
        ([assistant(tool_calls=[called("")])], [assistant(tool_calls=[called({})])]),
        ([assistant(tool_calls=[called(None)])], [assistant(tool_calls=[called({})])]),
        ([assistant(tool_calls=[])], [assistant()]),
        (
            [{"role": "assistant", "content": None, "tool_calls": None, "refusal": None}],
            [assistant(refusal=None)],
        ),
        ([assistant(reasoning_content="r")], [assistant(reasoning_content="r")]),
        ([assistant(reasoning="r")], [assistant(reasoning_content="r")]),
        ([assistant(thinking="r", reasoning=None)], [assistant(reasoning_content="r")]),
        (
            [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "r", "signature": "s"},
                        {"type": "redacted_thinking", "data": "x"},
                        *parts("said", kind="output_text"),
                    ],
                }
            ],
            [{"role": "assistant", "content": "said", "reasoning_content": "r"}],
        ),
        (
            [{"role": "tool", "tool_call_id": "call_1", "content": parts("done")}],
            [{"role": "tool", "content": "done", "tool_call_id": "call_1"}],
        ),
    ],
)
def test_a_conversation_is_brought_into_form(messages: Any, expected: Any) -> None:
    assert normalise(messages) == expected
    assert normalise(normalise(messages)) == expected


@pytest.mark.parametrize(
    ("message", "where", "what"),
    [
        ("hi", "messages[1]", "not a message"),
        ({"content": "x"}, "messages[1].role", "unknown role"),
        ({"role": "assitant", "content": "x"}, "messages[1].role", "unknown role"),
        ({"role": "user", "content": 5}, "messages[1].content", "not a content"),
        ({"role": "user", "content": [5]}, "messages[1].content[0]", "unknown part"),
        ({"role": "user", "content": [{"type": "file"}]}, "messages[1].content[0]", "unknown part"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[1].content[0]",
            "is image_url",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": 1}]},
            "messages[1].content[0].text",
            "not a text",
        ),
        (assistant(reasoning=["r"]), "messages[1].reasoning", "not a text"),
        (assistant(tool_calls="f()"), "messages[1].tool_calls", "not a list"),
        (assistant(tool_calls=[{}]), "messages[1].tool_calls[0]", "names no function"),
        (
            assistant(tool_calls=[called("[1]")]),
            "messages[1].tool_calls[0].function.arguments",
            "no JSON object",
        ),
        (
            assistant(tool_calls=[called('{"a": ')]),
            "messages[1].tool_calls[0].function.arguments",
            "are no JSON",
        ),
        (
            assistant(tool_calls=[called([1])]),
            "messages[1].tool_calls[0].function.arguments",
            "no JSON object",
        ),
    ],
)
def test_an_error_names_the_message(message: Any, where: str, what: str) -> None:
    with pytest.raises(OptionError, match=what) as caught:
        normalise([USER, message])
    assert caught.value.where == where


@pytest.mark.parametrize("messages", [[], None, "hi", {"role": "user"}])
def test_what_is_no_conversation_is_refused(messages: Any) -> None:
    with pytest.raises(OptionError, match="conversation"):
        normalise(messages)


def test_messages_may_be_objects_of_other_libraries() -> None:
    @dataclasses.dataclass
    class Said:
        role: str
        content: str

    assert normalise([Said("user", "hi")]) == [USER]


def test_a_template_takes_what_clients_send() -> None:
    """The system speaks late, a developer first, and calls come as JSON text."""
    sent = [
        {"role": "developer", "content": parts("one", kind="input_text")},
        {"role": "system", "content": "two"},
        {"role": "user", "content": parts("list files")},
        assistant(reasoning="think", tool_calls=[called('{"path":"/a"}')]),
        {"role": "tool", "tool_call_id": "call_1", "content": parts("a.txt")},
        {"role": "system", "content": "late"},
    ]
    text = render_chat(FAMILY, normalise(sent))
    assert text.startswith("<|im_start|>system\none\n\ntwo<|im_end|>\n<|im_start|>user\nlist files")
    assert "<call f>path=/a;" in text and "<tool>a.txt</tool>" in text
    assert text.endswith("<|im_start|>user\nlate<|im_end|>\n<|im_start|>assistant\n")
