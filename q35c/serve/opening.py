"""What answers while a model is loaded: 503 for everything. Then the application takes over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

from starlette.types import Receive, Scope, Send

from q35c.errors import Unavailable
from q35c.serve.app import App, find_route, live
from q35c.serve.errors import Dialect, describe, error_body
from q35c.serve.json_response import json_response
from q35c.serve.request import Serving

RETRY_SECONDS = 1
Make = Callable[[ExitStack], tuple[App, Serving]]


class Opening:
    """An ASGI application that stands for one which a thread makes.

    `make` enters what it opens into a stack, which `close` closes. `on_open` is called when there is an application,
    `on_failure` when there will be none; both in that thread.
    """

    def __init__(
        self, make: Make, *, on_open: Callable[[], object], on_failure: Callable[[], object]
    ) -> None:
        self._make, self._on_open, self._on_failure = make, on_open, on_failure
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._made: tuple[App, Serving] | None = None
        self._error: BaseException | None = None
        self._is_draining = False
        self._thread = threading.Thread(target=self._open, name="q35c-opening")

    def start(self) -> None:
        """Begin to make the application. To be called once."""
        self._thread.start()

    def start_draining(self) -> None:
        """Say at /health that this server is about to end."""
        with self._lock:
            self._is_draining = True
        if self._made is not None:
            self._made[0].start_draining()

    def drain(self, seconds: float) -> None:
        """Let running answers end, as the engine does. Before there is one there are none."""
        if self._made is not None:
            self._made[1].drain(seconds)

    def close(self) -> None:
        """Close what was opened, after the application is made. Raises what making it raised."""
        if self._thread.ident is not None:
            self._thread.join()
        self._stack.close()
        if self._error is not None:
            raise self._error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await live(receive, send, self._end)
        elif self._made is not None:
            await self._made[0](scope, receive, send)
        elif scope["type"] == "http":
            await self._turn_away(scope, receive, send)

    def _open(self) -> None:
        try:
            made = self._make(self._stack)
        except BaseException as error:  # it is raised where the server is waited for
            self._error = error
            self._on_failure()
            return
        with self._lock:
            if self._is_draining:
                return
            self._made = made
        self._on_open()

    def _end(self) -> None:
        if self._made is not None:
            self._made[0].close()

    async def _turn_away(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = find_route(scope["path"])
        if route is not None and route.path == "/health":
            status = "draining" if self._is_draining else "loading"
            await json_response({"status": status}, 503)(scope, receive, send)
            return
        failure = describe(Unavailable("the model is being loaded", hint="try again in a second"))
        body = error_body(route.dialect if route else Dialect.OPENAI, failure)
        headers = {"Retry-After": str(RETRY_SECONDS)}
        await json_response(body, failure.status, headers)(scope, receive, send)
