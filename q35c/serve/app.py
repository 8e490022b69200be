"""The application: which request is answered by what, and what goes for all of them.

A request is refused or let through by the route that was found for it, never by the text of its path.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from q35c.errors import InputError, RequestError
from q35c.serve import anthropic, completions, models, openai, responses, tokens
from q35c.serve.access import Keys, check_host, cors_headers, preflight_headers
from q35c.serve.conversation import TextModel
from q35c.serve.desk import Desk
from q35c.serve.errors import Dialect, describe, error_body
from q35c.serve.incoming import Gone, Incoming
from q35c.serve.json_response import json_response
from q35c.serve.log import log, log_failure
from q35c.serve.request import Serving
from q35c.serve.settings import Settings

Answer = Callable[[Desk, Incoming], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """How a path is answered; `path` is also what metrics and logs call it. An open one asks for no key."""

    path: str
    method: str
    answer: Answer
    dialect: Dialect = Dialect.OPENAI
    is_open: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        return ("GET", "HEAD") if self.method == "GET" else (self.method,)


_MODEL = Route("/v1/models/{id}", "GET", models.answer_model)
_TABLE = (
    Route("/", "GET", models.answer_root),
    Route("/health", "GET", models.answer_health, is_open=True),
    Route("/metrics", "GET", models.answer_metrics),
    Route("/v1/models", "GET", models.answer_models),
    Route("/v1/chat/completions", "POST", openai.answer_chat),
    Route("/v1/completions", "POST", completions.answer_completions),
    Route("/v1/responses", "POST", responses.answer_responses, Dialect.RESPONSES),
    Route("/v1/messages", "POST", anthropic.answer_messages, Dialect.ANTHROPIC),
    Route("/v1/messages/count_tokens", "POST", anthropic.answer_count, Dialect.ANTHROPIC),
    Route("/tokenize", "POST", tokens.answer_tokenize),
    Route("/detokenize", "POST", tokens.answer_detokenize),
)
ROUTES: Mapping[str, Route] = MappingProxyType({route.path: route for route in _TABLE})


def find_route(path: str) -> Route | None:
    """Return the route of a path, None if there is none."""
    beyond = path.removeprefix("/v1/models/")
    if beyond and beyond != path:
        return _MODEL
    return ROUTES.get(path)


async def live(receive: Receive, send: Send, close: Callable[[], object]) -> None:
    """Answer what a server says of its beginning and end; `close` is called at the end."""
    await receive()
    await send({"type": "lifespan.startup.complete"})
    with contextlib.suppress(asyncio.CancelledError):  # ended by force
        await receive()
    close()
    await send({"type": "lifespan.shutdown.complete"})


class App:
    """An ASGI application. Ends nothing that it was given: engine and model are their owner's."""

    def __init__(self, model: TextModel, engine: Serving, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        self._keys = Keys(self._settings.keys)
        self._desk = Desk(model, engine, self._settings, [*ROUTES, _MODEL.path])

    def start_draining(self) -> None:
        """Say at /health that this server is about to end; the engine is told by its owner."""
        self._desk.is_draining = True

    def close(self) -> None:
        """End the threads that prepare requests."""
        self._desk.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await live(receive, send, self.close)
        elif scope["type"] == "http":
            await self._exchange(scope, receive, send)

    async def _exchange(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = time.perf_counter()
        log_bodies = self._settings.log_prompts
        incoming = Incoming(scope, receive, self._desk.bodies, log_bodies)
        route = find_route(incoming.path)
        origin = cors_headers(incoming.headers, self._settings.cors_origins)
        sender = _Sender(send, {"X-Request-Id": incoming.id, "Request-Id": incoming.id, **origin})
        try:
            response = await self._answer(incoming, route, bool(origin))
            await response(scope, receive, sender)
        except Gone:
            self._desk.metrics.count_cancelled("disconnect")
        except Exception as error:
            await self._fail(scope, receive, sender, incoming, route, error)
        finally:
            name = route.path if route else "other"
            self._desk.metrics.answered(name, sender.status)
            milliseconds = 1000 * (time.perf_counter() - begun)
            log.info("%s %s %s %.0f ms", incoming.id, name, sender.status or "gone", milliseconds)

    async def _answer(self, incoming: Incoming, route: Route | None, is_page: bool) -> Response:
        check_host(incoming.headers, self._settings.allowed_hosts)
        if incoming.method == "OPTIONS" and is_page and route is not None:
            return Response(status_code=204, headers=preflight_headers(route.methods))
        if route is None or not route.is_open:
            incoming.key = self._keys.check(incoming.headers)
        if route is None:
            raise RequestError("there is nothing at this path", status=404, code="not_found")
        if incoming.method not in route.methods:
            raise RequestError(
                "the path has other methods", status=405, expected=", ".join(route.methods)
            )
        return await route.answer(self._desk, incoming)

    async def _fail(
        self,
        scope: Scope,
        receive: Receive,
        sender: _Sender,
        incoming: Incoming,
        route: Route | None,
        error: Exception,
    ) -> None:
        failure = describe(error)
        self._desk.metrics.count_rejected(failure.status)
        if not isinstance(error, InputError):
            log_failure(incoming.id, error)
        if sender.status:  # too late to say so: the connection is closed by the server
            return
        headers = dict(failure.headers)
        if failure.status == 405 and route is not None:
            headers["Allow"] = ", ".join(route.methods)
        dialect = route.dialect if route else Dialect.OPENAI
        body = error_body(dialect, failure)
        await json_response(body, failure.status, headers)(scope, receive, sender)


class _Sender:
    """Send an answer with headers of every answer, and remember its status; 0: none was sent."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = [(k.lower().encode(), v.encode("latin-1")) for k, v in headers.items()]
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), *self._headers]
        await self._send(message)
