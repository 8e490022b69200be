"""Requests in which anything is something else are answered or refused: nothing is our own fault."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.cases import load
from tests.serve.harness import Running, chat
from tests.serve.test_chat import WEATHER

COUNT = 150  # of each body
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 1e308, 0.5, "", "x", "auto", "<think>", "\ud800", "a\x00b", "é" * 300, [], {},
    [None], [[]], [{}], [0], ["x"], {"type": "text"}, {"type": "text", "text": None}, {"type": "function"}, {"": ""}, {"a": {"b": []}},
    [{"role": "user", "content": "x"}], [{"role": "assistant"}], [{"type": "text", "text": "x"}], {"type": "object", "properties": []},
]  # fmt: skip
HISTORY = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "r",
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "rain"},
]
RICH = {
    "/v1/chat/completions": chat(
        messages=HISTORY, tools=[WEATHER], tool_choice="auto", max_tokens=4, stop=["y"], seed=1, n=1, logprobs=True,
        top_logprobs=1, logit_bias={"5": 1}, temperature=1, response_format={"type": "text"}, stream_options={"include_usage": True},
        chat_template_kwargs={"enable_thinking": True}, structured_outputs={}, user="u", cache_salt="s", priority=0,
    ),
    "/v1/completions": {
        "model": "m", "prompt": ["a", "b"], "max_tokens": 2, "echo": True, "logprobs": 1, "n": 1, "stop": "x", "stream": True,
        "structured_outputs": {"choice": ["a"]}, "logit_bias": {},
    },
    "/v1/responses": {
        "model": "m", "instructions": "i", "max_output_tokens": 4, "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}},
        "tools": [{"type": "function", "name": "f", "parameters": {}}, {"type": "namespace", "name": "n", "tools": []}], "tool_choice": "auto",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "o"},
        ],
    },
    "/v1/messages": {
        "model": "m", "max_tokens": 4, "system": [{"type": "text", "text": "s"}], "thinking": {"type": "enabled", "budget_tokens": 9},
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"}, "stop_sequences": ["x"],
        "metadata": {"user_id": "u"}, "output_config": {"effort": "high"},
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, {"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "o"}]},
        ],
    },
    "/tokenize": {"model": "m", "messages": HISTORY, "tools": [WEATHER]},
    "/detokenize": {"model": "m", "tokens": [1, 2]},
}  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container within a value, and a key into it."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from places(value[key])


def mutated(body: Any, dice: random.Random) -> Any:
    """Return a body in which one or two places are something else, or gone, or there twice."""
    made = copy.deepcopy(body)
    for _ in range(dice.choice((1, 1, 2))):
        holder, key = dice.choice(list(places(made)))
        kind = dice.random()
        if kind < 0.1:
            del holder[key]
        elif kind < 0.15 and isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder[key] = copy.deepcopy(dice.choice(VALUES))
        if not list(places(made)):
            break
    return made


@pytest.mark.parametrize("path", RICH)
def test_nothing_is_our_fault(server: Running, path: str) -> None:
    dice = random.Random(path)
    seen: set[int] = set()
    with server.client() as client:
        headers = {"content-type": "application/json"}
        assert client.post(path, json=RICH[path]).status_code == 200
        for number in range(COUNT):
            body = json.dumps(mutated(RICH[path], dice))
            answer = client.post(path, content=body.encode(), headers=headers)
            assert answer.status_code in (200, 400, 404), (number, body, answer.text)
            assert "its log says more" not in answer.text, (number, body, answer.text)
            seen.add(answer.status_code)
    assert seen >= {200, 400}


def test_nor_is_it_with_what_clients_send(server: Running) -> None:
    dice = random.Random(1)
    cases = [case for case in load("clients.jsonl") if case["body"] and len(str(case)) < 20_000]
    with server.client() as client:
        for case in cases * 12:
            body = json.dumps(mutated(case["body"], dice))
            answer = client.post(case["path"], content=body.encode(), headers=case["headers"])
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            assert "its log says more" not in answer.text, (body, answer.text)
