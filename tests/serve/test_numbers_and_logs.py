"""What the server says about itself: metrics of fixed names, and a log without anybody's words."""

from __future__ import annotations

import logging

import httpx
import pytest

from tests.serve.fakes import FakeEngine, internal_error
from tests.serve.harness import Running, chat, running, wait_until

NAMES = [
    "answers",
    "cached_tokens",
    "cancelled",
    "e2e_seconds",
    "evictions",
    "generated_tokens",
    "grammar_seconds",
    "itl_seconds",
    "misses",
    "prefill_slices",
    "prompt_tokens",
    "queue_seconds",
    "rejected",
    "requests",
    "rows",
    "running",
    "state_bytes",
    "step_stall_ratio",
    "steps",
    "stream_failures",
    "ttft_seconds",
    "unknown_fields",
    "waiting",
    "waiting_tokens",
]
CHAT = "/v1/chat/completions"


def series(client: httpx.Client) -> list[str]:
    lines = client.get("/metrics").text.splitlines()
    return [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]


def test_the_names_of_metrics(client: httpx.Client) -> None:
    client.post(CHAT, json=chat())
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line.split() for line in answer.text.splitlines() if line.startswith("# TYPE")]
    found = {line[2].removeprefix("q35c_").removesuffix("_total") for line in lines}
    found = {name.removesuffix("_created").removesuffix("_total") for name in found}
    assert sorted(found) == sorted(NAMES)
    line = 'q35c_requests_total{route="/v1/chat/completions",status="200"}'
    wait_until(lambda: line in client.get("/metrics").text)


def test_no_client_can_make_the_series_grow() -> None:
    with running(names=("m",)) as server, server.client() as client:

        def round(number: int) -> None:
            client.get(f"/path/{number}")
            client.get(f"/v1/models/{number}")
            body = chat(user=f"user {number}", cache_salt=f"s{number}")
            body[f"field_{number}"] = 1
            client.post(CHAT, json=body)
            client.post(CHAT, json={**body, "model": f"model-{number}"})

        round(0)
        client.get("/metrics")
        before = series(client)
        for number in range(1, 50):
            round(number)
        assert series(client) == before
        assert "q35c_unknown_fields_total 50.0" in client.get("/metrics").text


def test_the_log_has_ids_routes_and_counts(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "q35c.serve")
    with server.client() as client:
        client.post(CHAT, json=chat(), headers={"x-request-id": "my-id"})
    wait_until(lambda: "my-id /v1/chat/completions 200" in caplog.text)  # after the answer
    assert "6 new, stop" in caplog.text


def test_the_log_has_nobodys_words(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    engine = FakeEngine(lambda request: "</think>spoken words")
    with running(engine, keys=("the-key-itself",)) as server:
        headers = {"authorization": "Bearer the-key-itself"}
        with server.client(headers=headers) as client:
            client.post(CHAT, json=chat("written words"))
            engine.say = lambda request: internal_error()
            assert client.post(CHAT, json=chat("written words")).status_code == 500
            client.post(CHAT, json=chat("written words", stream=True))
            monkeypatch.setattr(engine, "compile", lambda structure: {}[engine.requests[0]])
            body = chat("written words", response_format={"type": "json_object"})
            assert client.post(CHAT, json=body).status_code == 500
    ours = "\n".join(
        r.getMessage() for r in caplog.records if r.name.startswith(("q35c", "uvicorn"))
    )
    assert "failed: InternalError" in ours and "failed: KeyError" in ours
    for secret in ("words", "the-key", "secret detail"):
        assert secret not in ours


def test_a_panic_of_a_library_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(structure: object) -> None:
        raise PanicException("written words")

    engine = FakeEngine()
    monkeypatch.setattr(engine, "compile", panic)
    with running(engine) as server, server.client() as client:
        answer = client.post(CHAT, json=chat(response_format={"type": "json_object"}))
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert client.post(CHAT, json=chat()).status_code == 200


def test_a_log_of_prompts_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "q35c.serve")
    with running(log_prompts=True) as server, server.client() as client:
        client.post(CHAT, json=chat("written\nwords"))
    assert r"written\\nwords" in caplog.text


def test_an_error_of_ours_tells_a_client_nothing(server: Running) -> None:
    server.engine.say = lambda request: internal_error()
    with server.client() as client:
        for path, body in (
            (CHAT, chat()),
            ("/v1/completions", {"model": "m", "prompt": "x"}),
            ("/v1/responses", {"model": "m", "input": "x"}),
            ("/v1/messages", {**chat(), "max_tokens": 9}),
        ):
            for is_stream in (False, True):
                answer = client.post(path, json={**body, "stream": is_stream})
                assert "0x7f" not in answer.text and "file.py" not in answer.text
                assert "its log says more" in answer.text
