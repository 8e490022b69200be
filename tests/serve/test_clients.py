"""Requests in the form in which agents and libraries send them are answered, whatever they hold beside."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serve.cases import load
from tests.serve.harness import Running, events

CASES = load("clients.jsonl")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_is_answered(server: Running, client: httpx.Client, case: Any) -> None:
    answer = client.request(
        case["method"],
        case["path"],
        params=case["query"] or None,
        json=case["body"],
        headers=case["headers"],
    )
    assert answer.status_code == 200, answer.text
    if case["body"] and case["body"].get("stream"):
        last = events(answer.text)[-1]
        ends = ("response.completed", "message_stop")
        assert last == "[DONE]" or last["type"] in ends
    elif case["body"]:
        assert answer.json()


def test_a_tool_that_no_mask_could_enforce_is_offered_all_the_same(server: Running) -> None:
    case = next(case for case in CASES if case["case"] == "messages-agent-first-turn")
    with server.client() as client:
        client.post("/v1/messages", json=case["body"])
    prompt = bytes(i for i in server.engine.requests[-1].ids if i < 256)
    assert b"propertyNames" in prompt and b"x-anthropic-billing-header" not in prompt
