"""In idle times a server computes what the next turn will begin with; whoever comes meanwhile does not wait for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from q35c.serve.engine import Engine
from q35c.serve.request import Finished, Request
from tests.serve.fakes import FakeEngine
from tests.serve.harness import Running, chat, running, wait_until
from tests.serve.talk import Answer, ask, request
from tests.serve.test_chat import CALL, WEATHER
from tests.serve.test_engine_cache import FIRST, START, model, text

__all__ = ["model"]  # a fixture

QUESTION = "what is it like in Bonn, where the river bends and the old bridge was?"
THOUGHT = "Let me see.\n</think>\n\nIt is fine."


@pytest.fixture
def server() -> Iterator[Running]:
    with running(FakeEngine(), warm_up=True) as made:
        yield made


def talk(server: Running, path: str, body: Any) -> Any:
    with server.client() as client:
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


def warmed(server: Running) -> Request:
    """Wait for the request that nobody made."""
    wait_until(lambda: len(server.engine.requests) == 2)
    asked, idle = server.engine.requests
    assert idle.is_idle and not asked.is_idle and idle.options.max_new_tokens == 0
    assert (idle.client, idle.salt, idle.deadline) == (asked.client, asked.salt, None)
    return idle


def test_the_next_turn_begins_with_what_was_computed(server: Running) -> None:
    server.engine.say = lambda request: THOUGHT
    answer = talk(server, "/v1/chat/completions", chat(QUESTION))["choices"][0]["message"]
    idle = warmed(server)
    messages = [*chat(QUESTION)["messages"], answer, {"role": "user", "content": "And now?"}]
    talk(server, "/v1/chat/completions", {"model": "m", "messages": messages})
    ids = server.engine.requests[2].ids
    assert ids[: len(idle.ids)] == idle.ids and idle.ids[-1] == ids[len(idle.ids) - 1]
    assert b"And now?" in bytes(i for i in ids[len(idle.ids) :] if i < 256)
    assert b"It is fine." in bytes(i for i in idle.ids if i < 256)


def test_behind_a_call_comes_its_result(server: Running) -> None:
    server.engine.say = lambda request: "</think>" + CALL.format("Bonn")
    body = chat(QUESTION, tools=[WEATHER])
    answer = talk(server, "/v1/chat/completions", body)["choices"][0]["message"]
    idle = warmed(server)
    result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "7 °C"}
    messages = [*body["messages"], answer, result]
    talk(server, "/v1/chat/completions", {**body, "messages": messages})
    assert server.engine.requests[2].ids[: len(idle.ids)] == idle.ids


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", chat(QUESTION, max_tokens=50)),
        ("/v1/responses", {"model": "m", "input": QUESTION}),
    ],
)
def test_every_dialect_has_a_next_turn(server: Running, path: str, body: Any) -> None:
    if path == "/v1/responses":  # which lets the template decide about thinking
        server.engine.say = lambda request: "</think>Hello"
    talk(server, path, body)
    assert b"Hello" in bytes(i for i in warmed(server).ids if i < 256)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"max_completion_tokens": 3},  # nobody knows how it would have gone on
        {"messages": [{"role": "user", "content": "short"}]},
    ],
    ids=str,
)
def test_what_is_not_worth_it(server: Running, fields: Any) -> None:
    before = 2 if "n" in fields else 1
    talk(server, "/v1/chat/completions", {**chat(QUESTION), **fields})
    talk(server, "/v1/completions", {"model": "m", "prompt": "x" * 200, "max_tokens": 1})
    wait_until(lambda: not server.server._app._desk._tasks)
    assert [r.is_idle for r in server.engine.requests] == [False] * (before + 1)


def test_a_server_that_was_not_asked_to_computes_nothing() -> None:
    with running(FakeEngine()) as server:
        talk(server, "/v1/chat/completions", chat(QUESTION))
        assert json.dumps(len(server.engine.requests)) == "1"


# --- the engine -----------------------------------------------------------------------------------

NEXT = [*FIRST, *text(70, 2), START]  # the answer as the template writes it, and a beginning


def test_what_was_computed_while_idle_is_found(model: Any) -> None:
    engine = Engine(model, cache_bytes=1 << 28)
    ask(engine, request(FIRST, 3))
    (idle,) = ask(engine, request(NEXT, 0, is_idle=True))
    (answer,) = ask(engine, request([*NEXT, 5, *text(9, 3), START, 6], 3))
    assert isinstance(idle.last, Finished) and idle.last.reason == "length"
    assert answer.last.usage.cached_tokens == (len(NEXT) - 1) // 64 * 64
    assert engine.statistics().prompt_tokens == len(FIRST) + len(NEXT) + 12
    engine.close()


def test_it_is_given_up_for_whoever_comes(model: Any) -> None:
    engine, go_on, is_held = Engine(model, cache_bytes=1 << 28), threading.Event(), []

    def hold(request: Request, events: Any) -> None:
        is_held.append(True)
        assert go_on.wait(20)

    idle, other, late = Answer(), Answer(), Answer()
    engine.submit(request(FIRST, 1), hold)
    wait_until(lambda: bool(is_held))
    engine.submit(request([START, *text(1500, 5)], 0, is_idle=True), idle.post)
    engine.submit(request(FIRST, 2), other.post)
    engine.submit(request([START, *text(1500, 6)], 0, is_idle=True), late.post)
    go_on.set()
    assert other.wait().last.reason == "length"
    assert [answer.wait().last.reason for answer in (idle, late)] == ["cancelled", "cancelled"]
    assert engine.statistics().prefill_slices < 1500 // 64
    engine.close()
