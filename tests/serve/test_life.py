"""A request's life: who goes away, who waits, who is turned away, and how it all ends."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from q35c.serve.incoming import Bodies
from tests.serve.fakes import FakeEngine
from tests.serve.harness import Running, chat, events, running, wait_until
from tests.serve.raw import connect, post_bytes, read_until

CHAT = "/v1/chat/completions"
SHORT = {"chat_template_kwargs": {"enable_thinking": False}}


def ask(server: Running, **fields: Any) -> httpx.Response:
    with server.client() as client:
        return client.post(CHAT, json=chat(**SHORT, **fields))


def idle(server: Running) -> bool:
    numbers = server.engine.statistics()
    return numbers.running == 0 and numbers.waiting == 0


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("turns", [0, 5])
def test_a_client_that_goes_away_ends_its_rows(is_stream: bool, turns: int) -> None:
    engine = FakeEngine(lambda request: "x" * 100_000)
    if not turns:
        engine.gate.clear()
    with running(engine) as server:
        with connect(server.port) as made:
            made.sendall(post_bytes(json.dumps(chat(n=3, stream=is_stream)).encode()))
            wait_until(lambda: len(engine.requests) == 3 and engine.turns >= turns)
        wait_until(lambda: len(engine.cancelled) == 3)
        engine.gate.set()
        wait_until(lambda: idle(server))
        with server.client() as client:
            line = 'q35c_cancelled_total{reason="disconnect"} 1.0'
            wait_until(lambda: line in client.get("/metrics").text)


def test_a_storm_of_clients_that_go_away_leaves_nothing_behind() -> None:
    with running(FakeEngine(lambda request: "x" * 1000)) as server:
        body = post_bytes(json.dumps(chat(stream=True)).encode())
        for number in range(200):
            with connect(server.port) as made:
                made.sendall(body[: len(body) - (number % 3 == 2) * 5])
                if number % 3 == 1:
                    read_until(made, b"200 OK")
        wait_until(lambda: not server.server.server_state.connections and idle(server))
        assert ask(server).status_code == 200
        wait_until(lambda: not server.server.server_state.tasks)


def test_the_head_of_a_stream_comes_at_admission_and_pings_while_it_waits() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with running(engine, ping_seconds=0.05) as server:
        for path, body, ping in (
            (CHAT, chat(stream=True), b": ping\n\n"),
            ("/v1/messages", {**chat(stream=True), "max_tokens": 9}, b"event: ping\n"),
        ):
            with connect(server.port) as made:
                made.sendall(post_bytes(json.dumps(body).encode(), path))
                data = read_until(made, ping)
                assert b" 200 OK" in data and b"Hello" not in data


def content_of(answer: httpx.Response) -> str:
    """Return the content of an answer, whole or as a stream."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.json()["choices"][0]["message"]["content"]
    deltas = [chunk["choices"][0]["delta"] for chunk in events(answer.text)[:-1]]
    return "".join(delta.get("content") or "" for delta in deltas)


def test_a_full_queue_turns_clients_away() -> None:
    engine = FakeEngine(batch=1, queue=2)
    engine.gate.clear()
    with running(engine) as server, ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask, server, stream=bool(i % 2)) for i in range(12)]
        wait_until(lambda: sum(a.done() for a in asked) >= 10)
        refused = [a.result() for a in asked if a.done()]
        assert {answer.status_code for answer in refused} == {429}
        assert {answer.headers["retry-after"] for answer in refused} == {"3"}
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        engine.gate.set()
        accepted = [a.result() for a in asked if a.result().status_code == 200]
        assert len(accepted) >= 2
        assert {content_of(answer) for answer in accepted} == {"Hello"}


def test_all_rows_of_a_request_are_taken_or_none() -> None:
    engine = FakeEngine(batch=1, queue=2)
    engine.gate.clear()
    with running(engine) as server:
        assert ask(server, n=3).status_code == 429
        engine.gate.set()
        wait_until(lambda: idle(server))
        assert ask(server).status_code == 200


def test_who_waits_too_long_is_told_so() -> None:
    engine = FakeEngine(lambda request: "x" * 200_000, batch=1)
    with running(engine, queue_seconds=0.0) as server, connect(server.port) as made:
        made.sendall(post_bytes(json.dumps(chat(stream=True)).encode()))
        answer = json.loads(read_until(made, b"}}").partition(b"\r\n\r\n")[2])
        assert answer["error"]["code"] == "queue_timeout"


def test_draining_lets_running_answers_end_and_refuses_others() -> None:
    engine = FakeEngine(lambda request: "x" * 50, batch=2)
    with running(engine, drain_seconds=10) as server, ThreadPoolExecutor(8) as pool:
        engine.gate.clear()
        asked = [pool.submit(ask, server, stream=True, max_tokens=50) for _ in range(5)]
        wait_until(lambda: len(engine.requests) == 5)
        engine.gate.set()
        wait_until(lambda: engine.statistics().running == 2)
        engine.gate.clear()
        wait_until(lambda: engine.statistics().running == 2)
        server.server.stop()
        wait_until(lambda: sum(a.done() for a in asked) == 3)
        assert {a.result().status_code for a in asked if a.done()} == {503}
        with pytest.raises(httpx.ConnectError):
            ask(server)
        engine.gate.set()
        whole = [a.result() for a in asked if a.result().status_code == 200]
        assert len(whole) == 2
        for answer in whole:
            assert events(answer.text)[-2]["choices"][0]["finish_reason"] == "length"


def test_what_outlasts_the_drain_is_cancelled_in_words() -> None:
    engine = FakeEngine(lambda request: "x" * 10_000_000)
    with running(engine, drain_seconds=0.1) as server, ThreadPoolExecutor(3) as pool:
        streamed = pool.submit(ask, server, stream=True)
        whole = pool.submit(ask, server)
        wait_until(lambda: engine.statistics().running == 2)
        server.server.stop()
        assert events(streamed.result().text)[-2]["choices"][0]["finish_reason"] == "cancelled"
        assert whole.result().json()["choices"][0]["finish_reason"] == "cancelled"


def test_health_says_when_the_server_is_about_to_end() -> None:
    engine = FakeEngine(lambda request: "x" * 10_000_000)
    with running(engine, drain_seconds=0.3) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, stream=True)
        wait_until(lambda: engine.statistics().running == 1)
        with connect(server.port) as made:
            made.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")  # open when it begins
            wait_until(lambda: len(server.server.server_state.connections) == 2)
            server.server._app.start_draining()
            made.sendall(b"\r\n\r\n")
            assert b" 503 " in read_until(made, b"draining")
            server.server.stop()
        answer.result()


def test_many_clients_at_once_are_all_answered() -> None:
    with running(FakeEngine(lambda request: "x" * 30)) as server:
        failures: list[Any] = []

        def one(number: int) -> None:
            answer = ask(server, stream=number % 2 == 0)
            if answer.status_code != 200 or answer.text.count("x") < 30:
                failures.append(answer.text)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


def test_what_waits_to_be_prepared_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q35c.serve.desk.MAX_PREPARING", 2)
    engine, may_go_on = FakeEngine(), threading.Event()
    entered = threading.Semaphore(0)

    def compile(structure: Any) -> None:
        entered.release()
        may_go_on.wait(20)

    monkeypatch.setattr(engine, "compile", compile)
    with running(engine) as server, ThreadPoolExecutor(2) as pool:
        wanted = {"response_format": {"type": "json_object"}}
        asked = [pool.submit(ask, server, **wanted) for _ in range(2)]
        for _ in range(2):
            assert entered.acquire(timeout=20)
        refused = ask(server)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        may_go_on.set()
        assert [a.result().status_code for a in asked] == [200, 200]
        assert ask(server).status_code == 200


def test_bodies_share_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bodies.__init__, "__defaults__", (100_000,))
    with running() as server, server.client() as client:
        assert client.post(CHAT, json=chat("x" * 200_000)).status_code == 429
        for _ in range(3):  # what was read before is given back
            assert client.post(CHAT, json=chat("x" * 60_000)).status_code == 200
