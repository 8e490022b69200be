from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.serve.fakes import FakeEngine
from tests.serve.harness import Running, running


@pytest.fixture(scope="session")
def shared() -> Iterator[Running]:
    """Return a server for tests that leave nothing behind."""
    with running(FakeEngine()) as made:
        yield made


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """Return the shared server, which says "Hello" unless the test sets `engine.say`."""
    say = shared.engine.say
    yield shared
    shared.engine.say = say
    shared.engine.gate.set()


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made
