"""While a model is loaded every request is told to come back, and what goes wrong is told to who waits for the server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from q35c.errors import ArtifactError
from q35c.serve.app import App
from q35c.serve.opening import Opening
from q35c.serve.server import Server, listen, url_of
from q35c.serve.settings import Settings
from tests.serve.fakes import FakeEngine, FakeModel
from tests.serve.harness import chat, wait_until


class Loading:
    """A server whose model is there when the test says so."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_load, self.is_open, self.closed = threading.Event(), threading.Event(), []
        self.error = error
        self.opening = Opening(
            self.make, on_open=self.is_open.set, on_failure=lambda: self.server.stop()
        )
        self.listener = listen("127.0.0.1", 0)
        self.server = Server(
            self.opening, self.opening, drain_seconds=0.2, on_ready=lambda _: self.opening.start()
        )
        self.client = httpx.Client(base_url=url_of(self.listener), timeout=20, trust_env=False)
        self.thread = threading.Thread(target=self.server.run_on, args=(self.listener,))
        self.thread.start()

    def make(self, stack: ExitStack) -> tuple[App, FakeEngine]:
        engine = FakeEngine()
        stack.callback(engine.close)
        stack.callback(self.closed.append, "engine")
        assert self.may_load.wait(20)
        if self.error is not None:
            raise self.error
        return App(FakeModel(), engine, Settings(names=("m",))), engine

    def end(self) -> None:
        self.may_load.set()
        self.client.close()
        self.server.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def loading() -> Iterator[Loading]:
    made = Loading()
    yield made
    made.end()
    made.opening.close()
    assert made.closed == ["engine"]


def test_everything_is_503_until_the_model_is_there(loading: Loading) -> None:
    client = loading.client
    health = client.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "loading"})
    openai = client.post("/v1/chat/completions", json=chat())
    assert (openai.status_code, openai.headers["retry-after"]) == (503, "1")
    assert openai.json()["error"]["code"] == "unavailable"
    anthropic = client.post("/v1/messages", json=chat(max_tokens=3))
    assert anthropic.json()["error"]["type"] == "overloaded_error"
    assert client.get("/no/such/path").status_code == 503
    loading.may_load.set()
    assert loading.is_open.wait(20)
    assert client.get("/health").json() == {"status": "ok"}
    assert client.post("/v1/chat/completions", json=chat()).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    loading = Loading(ArtifactError("damaged"))
    loading.may_load.set()
    loading.thread.join(20)
    assert not loading.thread.is_alive() and not loading.is_open.is_set()
    with pytest.raises(ArtifactError, match="damaged"):
        loading.opening.close()
    loading.end()
    assert loading.closed == ["engine"]


def test_a_server_that_is_ended_while_it_loads_never_opens(loading: Loading) -> None:
    assert loading.client.get("/health").status_code == 503
    loading.server.stop()
    wait_until(lambda: loading.opening._is_draining)
    loading.end()
    loading.opening.close()
    assert not loading.is_open.is_set()
