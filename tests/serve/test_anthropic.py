"""Messages: blocks in, blocks out, and the events that build them up."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.serve.fakes import internal_error
from tests.serve.harness import Running, events
from tests.serve.test_chat import CALL, THOUGHT, post
from tests.serve.test_responses import prompt_of

PATH = "/v1/messages"
TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}  # fmt: skip
THINKING = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


def ask(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": "m", "max_tokens": 1000, "messages": messages, **fields}


def test_an_answer_is_a_list_of_blocks(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: THOUGHT
    answer = post(client, ask(tools=[TOOL], **THINKING), PATH)
    thinking, text, call = answer["content"]
    assert thinking["thinking"] == "Let me see." and thinking["signature"]
    assert text == {"type": "text", "text": "It is fine."}
    assert (call["name"], call["input"]) == ("weather", {"city": "Bonn"})
    assert answer["stop_reason"] == "tool_use"
    usage, prompt = answer["usage"], len(server.engine.requests[-1].ids)
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == prompt
    assert usage["cache_read_input_tokens"] == prompt // 2
    assert usage["output_tokens"] == len(THOUGHT) + 1


def test_a_stream_builds_up_the_same_blocks(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: THOUGHT
    answer = client.post(PATH, params={"beta": "true"}, json=ask(tools=[TOOL], stream=True, **THINKING))  # fmt: skip
    made = events(answer.text)
    names = [line[7:] for line in answer.text.split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in made]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    kinds = [kind for i, kind in enumerate(names) if i == 0 or names[i - 1] != kind]
    assert kinds == ["message_start", *block * 3, "message_delta", "message_stop"]
    starts = [e for e in made if e["type"] == "content_block_start"]
    assert [e["content_block"]["type"] for e in starts] == ["thinking", "text", "tool_use"]
    assert [e["index"] for e in starts] == [0, 1, 2]
    deltas = [e["delta"] for e in made if e["type"] == "content_block_delta"]
    assert "".join(d.get("thinking", "") for d in deltas) == "Let me see."
    assert [d["type"] for d in deltas].count("signature_delta") == 1
    assert "".join(d.get("text", "") for d in deltas) == "It is fine."
    assert json.loads("".join(d.get("partial_json", "") for d in deltas)) == {"city": "Bonn"}
    assert made[0]["message"]["usage"]["output_tokens"] == 0
    assert made[-2]["delta"]["stop_reason"] == "tool_use"
    assert made[-2]["usage"]["output_tokens"] == len(THOUGHT) + 1


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 2}, "max_tokens", None),
        ({"stop_sequences": ["llo"]}, "stop_sequence", "llo"),
    ],
)
def test_why_an_answer_ended(
    client: httpx.Client, fields: Any, reason: str, sequence: str | None
) -> None:
    answer = post(client, ask(**fields), PATH)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert answer["content"][0]["text"] in ("Hello", "He")  # thinking is off unless asked for


def test_history_becomes_messages(server: Running, client: httpx.Client) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "q35c"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}], "is_error": False},
            {"type": "text", "text": "well?"},
        ]},
        {"role": "system", "content": "be kind"},
    ]  # fmt: skip
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=12345;"},
        {"type": "text", "text": "rules"},
        {"type": "text", "text": "more"},
    ]
    post(client, ask(system=system, messages=messages), PATH)
    assert prompt_of(server) == (
        "#system\nrules\n\nmore#\n#user\na\n\nb#\n#assistant\nI look."
        '<tool_call>weather {"city": "Bonn"}</tool_call>#\n#tool\nrain#\n#user\nwell?#\n'
        "#user\nbe kind#\n#assistant\n<think>\n\n</think>\n\n"
    )


def test_an_assistants_last_message_begins_the_answer(
    server: Running, client: httpx.Client
) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hell"}]
    post(client, ask(messages=messages), PATH)
    assert prompt_of(server).endswith("#assistant\nHell")


def test_tokens_are_counted(server: Running, client: httpx.Client) -> None:
    body = ask(tools=[TOOL], system="s")
    del body["max_tokens"]
    counted = post(client, body, PATH + "/count_tokens")["input_tokens"]
    post(client, {**body, "max_tokens": 1}, PATH)
    assert counted == len(server.engine.requests[-1].ids)


@pytest.mark.parametrize(
    ("choice", "kind", "is_parallel"),
    [
        ({"type": "any"}, "calls", True),
        ({"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, "calls", False),
    ],
)
def test_calls_can_be_forced(
    server: Running, client: httpx.Client, choice: Any, kind: str, is_parallel: bool
) -> None:
    server.engine.say = lambda request: CALL.format("x")
    post(client, ask(tools=[TOOL], tool_choice=choice), PATH)
    structure = server.engine.structures[-1]
    assert (structure.kind, structure.is_parallel) == (kind, is_parallel)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/"}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0]"),
        ({"tools": [{"name": "a b"}]}, "tools[0].name"),
        ({"thinking": {"type": "x"}}, "thinking.type"),
        ({"stop_sequences": [""]}, "stop_sequences"),
    ],
)  # fmt: skip
def test_errors_have_anthropics_shape(client: httpx.Client, fields: Any, said: str) -> None:
    answer = client.post(PATH, json={**ask(), **fields})
    error = answer.json()
    assert answer.status_code == 400 and error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"].startswith(said + ":")


def test_a_failure_is_the_last_event(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: internal_error()
    made = events(client.post(PATH, json=ask(stream=True)).text)
    assert made[-1]["error"]["type"] == "api_error" and "secret" not in json.dumps(made)
