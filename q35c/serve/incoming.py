"""A request as it comes in: its head, and its body read with all limits before anything is made of it."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from q35c import strictjson
from q35c.errors import Overloaded, RequestError
from q35c.serve.access import request_id
from q35c.serve.fields import Fields
from q35c.serve.log import log
from q35c.serve.settings import (
    BODY_SECONDS,
    MAX_BODIES_BYTES,
    MAX_BODY_BYTES,
    MAX_BODY_DEPTH,
    MAX_BODY_VALUES,
)

MOST_LOGGED_BYTES = 100_000
_SMALL_BYTES = 64 << 10  # parsed at once; more would hold up the event loop


class Gone(Exception):
    """The client has closed its connection."""


class Bodies:
    """The bytes of all bodies that are being read: many at once must not fill the memory."""

    def __init__(self, most: int = MAX_BODIES_BYTES) -> None:
        self._left = most

    def take(self, size: int) -> None:
        """Count bytes. Raises Overloaded."""
        if size > self._left:
            raise Overloaded("too many large requests at once", retry_after_seconds=1.0)
        self._left -= size

    def give_back(self, size: int) -> None:
        self._left += size


class Incoming:
    """One request. `key` is the number of its API key once that was checked."""

    def __init__(
        self, scope: Scope, receive: Receive, bodies: Bodies, log_bodies: bool = False
    ) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = Headers(scope=scope)
        self.id = request_id(self.headers)
        self.key = 0
        self._receive, self._bodies = receive, bodies
        self._taken, self._log_bodies = 0, log_bodies

    async def fields(self, seconds: float = BODY_SECONDS) -> Fields:
        """Return the JSON object of the body. Raises RequestError, OptionError, Gone."""
        self._check_head()
        try:
            data = await self._body(seconds)
            if self._log_bodies:
                log.info("%s asks %s", self.id, ascii(data[:MOST_LOGGED_BYTES])[1:])
            if len(data) <= _SMALL_BYTES:
                return Fields(_parse(data))
            return Fields(await asyncio.to_thread(_parse, data))
        finally:
            self._bodies.give_back(self._taken)
            self._taken = 0

    def _check_head(self) -> None:
        media = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":  # a web page may send other types to us without asking
            raise RequestError(
                "the body must be JSON", status=415, hint="send `Content-Type: application/json`"
            )
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise RequestError("compressed bodies are not read", status=415)
        length = self.headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            raise RequestError("the body's length is no number")
        if len(length) > 18 or int(length) > MAX_BODY_BYTES:
            raise _too_large()

    async def _body(self, seconds: float) -> bytes:
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout(seconds):
                has_more = True
                while has_more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    piece = message.get("body", b"")
                    if self._taken + len(piece) > MAX_BODY_BYTES:
                        raise _too_large()
                    self._bodies.take(len(piece))
                    self._taken += len(piece)
                    pieces.append(piece)
                    has_more = message.get("more_body", False)
        except TimeoutError:
            raise RequestError("the body did not arrive in time", status=408) from None
        return b"".join(pieces)


def _too_large() -> RequestError:
    return RequestError(
        "the body is too large", status=413, expected=f"at most {MAX_BODY_BYTES} bytes"
    )


def _parse(data: bytes) -> Any:
    return strictjson.loads(
        data,
        where="body",
        limit=MAX_BODY_BYTES,
        error=RequestError,
        max_values=MAX_BODY_VALUES,
        max_depth=MAX_BODY_DEPTH,
    )
