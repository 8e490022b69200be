"""Responses: items in, items out, and the events that build them up."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.serve.fakes import internal_error
from tests.serve.harness import Running, events
from tests.serve.test_chat import CALL, THOUGHT, post

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "strict": False, "parameters": {"type": "object"}}


def ask(text: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": text, **fields}


def prompt_of(server: Running) -> str:
    return bytes(i if i < 256 else 35 for i in server.engine.requests[-1].ids).decode()


def test_an_answer_is_a_list_of_items(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: THOUGHT
    answer = post(client, ask(tools=[TOOL], instructions="be brief"), PATH)
    reasoning, message, call = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert message["content"][0]["text"] == "It is fine."
    assert json.loads(call["arguments"]) == {"city": "Bonn"} and call["name"] == "weather"
    assert answer["status"] == "completed" and answer["instructions"] == "be brief"
    assert answer["usage"]["output_tokens"] == len(THOUGHT) + 1
    assert "system\n" in prompt_of(server) and "be brief" in prompt_of(server)


def test_a_stream_builds_up_the_same_items(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: THOUGHT
    answer = client.post(PATH, json=ask(tools=[TOOL], stream=True))
    made = events(answer.text)
    assert [event["sequence_number"] for event in made] == list(range(len(made)))
    names = [line[7:] for line in answer.text.split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in made]
    kinds = [kind for i, kind in enumerate(names) if i == 0 or names[i - 1] != kind]
    text = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done"]
    text += ["output_item.done"]
    arguments = "function_call_arguments"
    call = ["output_item.added", f"{arguments}.delta", f"{arguments}.done", "output_item.done"]
    expected = ["created", "in_progress", *(t.format("reasoning_text") for t in text)]
    expected += [*(t.format("output_text") for t in text), *call, "completed"]
    assert kinds == [f"response.{kind}" for kind in expected]
    done = [e["item"] for e in made if e["type"] == "response.output_item.done"]
    assert made[-1]["response"]["output"] == done
    assert [item["status"] for item in done] == ["completed"] * 3
    for kind in ("reasoning_text", "output_text"):
        deltas = "".join(e["delta"] for e in made if e["type"] == f"response.{kind}.delta")
        assert deltas == next(e["text"] for e in made if e["type"] == f"response.{kind}.done")


def test_a_cut_answer_is_incomplete(server: Running, client: httpx.Client) -> None:
    answer = post(client, ask(max_output_tokens=3, reasoning={"effort": "none"}), PATH)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    streamed = events(client.post(PATH, json=ask(max_output_tokens=3, stream=True)).text)
    assert streamed[-1]["type"] == "response.incomplete"


def test_history_becomes_messages(server: Running, client: httpx.Client) -> None:
    post(
        client,
        ask(
            [
                {"role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
                {"role": "user", "content": "what is it like?"},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{\"a\":1}"},
                {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
                {"type": "web_search_call", "id": "w", "status": "completed"},
            ]
        ),
        PATH,
    )  # fmt: skip
    assert prompt_of(server) == (
        "#system\nrules#\n#user\nwhat is it like?#\n#assistant\nI look."
        '<tool_call>weather {"a": 1}</tool_call><tool_call>weather {}</tool_call>#\n'
        "#tool\nrain#\n#tool\nsun#\n#assistant\n<think>\n"
    )


def test_members_of_a_namespace_are_tools(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: "</think>" + CALL.format("x")
    tools = [{"type": "namespace", "name": "outside", "tools": [TOOL]}, {"type": "web_search"}]
    (call,) = (i for i in post(client, ask(tools=tools), PATH)["output"] if "name" in i)
    assert (call["name"], call["namespace"]) == ("weather", "outside")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ],
)  # fmt: skip
def test_what_is_refused_by_name(client: httpx.Client, fields: Any, param: str) -> None:
    answer = client.post(PATH, json={**ask(), **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_a_failure_is_the_last_event(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: internal_error()
    made = events(client.post(PATH, json=ask(stream=True)).text)
    assert made[-1]["type"] == "response.failed"
    assert made[-1]["response"]["error"]["code"] == "server_error"
    assert "secret" not in json.dumps(made)
