"""A server on a loopback port in a thread, and plain ways to talk to it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from q35c.serve.app import App
from q35c.serve.guard import GuardedProtocol
from q35c.serve.server import Server, listen
from q35c.serve.settings import Settings
from tests.serve.fakes import FakeEngine, FakeModel


@dataclass
class Running:
    """A server that answers."""

    url: str
    port: int
    engine: FakeEngine
    server: Server
    thread: threading.Thread

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, **options)


@contextmanager
def running(
    engine: FakeEngine | None = None,
    *,
    model: Any = None,
    drain_seconds: float = 0.2,
    protocol: type[GuardedProtocol] = GuardedProtocol,
    **settings: Any,
) -> Iterator[Running]:
    """Serve a fake model until the block ends."""
    engine = engine or FakeEngine()
    app = App(model or FakeModel(), engine, Settings(**{"names": ("m", "*"), **settings}))
    is_ready = threading.Event()
    server = Server(
        app,
        engine,
        drain_seconds=drain_seconds,
        on_ready=lambda url: is_ready.set(),
        protocol=protocol,
    )
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run_on, args=(listener,))
    thread.start()
    assert is_ready.wait(10)
    try:
        yield Running(f"http://127.0.0.1:{port}", port, engine, server, thread)
    finally:
        server.stop()
        engine.gate.set()
        thread.join(20)
        engine.close()
        assert not thread.is_alive()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do; a test that waits in vain fails."""
    for _ in range(2000):
        if is_so():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come about")


def chat(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], **fields}


def events(text: str) -> list[Any]:
    """Return the documents of a stream, "[DONE]" as it is, comments left out."""
    made: list[Any] = []
    for block in text.split("\n\n"):
        data = [line[6:] for line in block.split("\n") if line.startswith("data: ")]
        if data:
            made.append(data[0] if data[0] == "[DONE]" else json.loads(data[0]))
    return made
