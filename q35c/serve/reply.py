"""Run an answer: hand its rows to the engine, read their events, write them in a dialect.

A client that goes away ends its rows, at whatever moment. The status line of a stream is sent when the first row is
admitted; what fails before that has a status of its own, what fails later is an event in the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from q35c.runtime.chat.answer import Part
from q35c.serve import sse
from q35c.serve.answer import Choice
from q35c.serve.errors import Failure, describe
from q35c.serve.metrics import Metrics
from q35c.serve.request import Event, Failed, Finished, Request, Scored, Started, Token
from q35c.serve.rows import Rows


class Writer(Protocol):
    """One answer in one dialect. Streaming methods return events, ready to send."""

    ping: bytes

    def open(self, index: int, choice: Choice) -> Iterable[bytes]:
        """Begin a row: it was admitted."""
        ...

    def write(self, index: int, choice: Choice, parts: list[Part]) -> Iterable[bytes]:
        """Write what came of a row."""
        ...

    def close(self, index: int, choice: Choice) -> Iterable[bytes]:
        """End a row."""
        ...

    def end(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        """End the stream."""
        ...

    def fail(self, failure: Failure) -> Iterable[bytes]:
        """End the stream by an error."""
        ...

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        ...


class Reply(Response):
    """An answer of the model as a response."""

    def __init__(
        self,
        rows: Rows,
        requests: Sequence[Request],
        choices: Sequence[Choice],
        writer: Writer,
        metrics: Metrics,
        *,
        is_stream: bool,
        ping_seconds: float,
    ) -> None:
        super().__init__()
        self._rows, self._requests, self._choices = rows, requests, choices
        self._writer, self._metrics = writer, metrics
        self._is_stream, self._ping_seconds = is_stream, ping_seconds
        self._open = set(range(len(choices)))
        self._begun = time.perf_counter()
        self._times: dict[int, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = self._stream(send) if self._is_stream else self._collect(scope, receive, send)
        work = asyncio.ensure_future(run)
        gone = asyncio.ensure_future(_gone(receive))
        try:
            self._rows.submit()
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                self._metrics.count_cancelled("disconnect")
        finally:
            self._rows.cancel()
            for task in (work, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _collect(self, scope: Scope, receive: Receive, send: Send) -> None:
        while self._open:
            for index, event in await self._rows.next():
                if isinstance(event, Failed):
                    raise event.error
                self._take(index, event)
        body = sse.dump(self._writer.whole(self._choices))
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        arrived = await self._rows.next()  # a failure here still has a status
        if isinstance(error := getattr(arrived[0][1], "error", None), Exception):
            raise error
        headers = [(k.lower().encode(), v.encode()) for k, v in sse.HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while self._open:
                await _send(send, self._written(arrived) or [self._writer.ping])
                if self._open:
                    arrived = await self._rows.next(self._ping_seconds)
            last = self._writer.end(self._choices)
        except Exception as error:
            self._metrics.count_failed(error)
            last = self._writer.fail(describe(error))
        await _send(send, last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _written(self, arrived: list[tuple[int, Event]]) -> list[bytes]:
        """Return what a stream says about events. Raises the error of a row that failed."""
        written: list[bytes] = []
        for index, event in arrived:
            if index not in self._open:
                continue
            if isinstance(event, Failed):
                raise event.error
            choice = self._choices[index]
            parts = self._take(index, event)
            if isinstance(event, Started):
                written += self._writer.open(index, choice)
            elif isinstance(event, (Token, Finished)):
                written += self._writer.write(index, choice, parts)
            if index not in self._open:
                written += self._writer.close(index, choice)
        return written

    def _take(self, index: int, event: Event) -> list[Part]:
        """Add an event to its row; return what is certain now. Rows that ended leave `_open`."""
        choice = self._choices[index]
        parts: list[Part] = []
        if index not in self._open:
            return parts
        if isinstance(event, Started):
            choice.start(event, len(self._requests[index].ids))
            self._metrics.started(time.perf_counter() - self._begun)
        elif isinstance(event, Scored):
            choice.score(event)
        elif isinstance(event, Token):
            self._note_time(index)
            parts = choice.push(event)
        elif isinstance(event, Finished):
            parts = choice.finish(event)
        if choice.reason is not None:
            self._open.discard(index)
            self._rows.cancel_row(index)  # a stop string: the engine does not know
            self._metrics.finished(choice.reason, choice.usage, time.perf_counter() - self._begun)
        return parts

    def _note_time(self, index: int) -> None:
        now = time.perf_counter()
        before = self._times.get(index)
        self._times[index] = now
        if before is None:
            self._metrics.first_token(now - self._begun)
        else:
            self._metrics.next_token(now - before)


async def _send(send: Send, written: Iterable[bytes]) -> None:
    if body := b"".join(written):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _gone(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
