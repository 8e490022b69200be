"""Run an answer: hand its rows to the engine, read their events, write them in a dialect.

A client that goes away ends its rows, at whatever moment. The status line of a stream is sent when the first row is
admitted; what fails before that has a status of its own, what fails later is an event in the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from q35c.errors import InputError, RequestError
from q35c.runtime.chat.answer import Part
from q35c.serve import sse
from q35c.serve.answer import Choice
from q35c.serve.errors import Failure, describe
from q35c.serve.json_response import json_response
from q35c.serve.log import log, log_failure
from q35c.serve.metrics import Metrics
from q35c.serve.request import Event, Failed, Finished, Scored, Started, Token
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
        choices: Sequence[Choice],
        writer: Writer,
        metrics: Metrics,
        *,
        identity: str,
        is_stream: bool,
        ping_seconds: float,
    ) -> None:
        super().__init__()
        self._rows, self._choices = rows, choices
        self._writer, self._metrics, self._identity = writer, metrics, identity
        self._is_stream, self._ping_seconds = is_stream, ping_seconds
        self.on_end: Callable[[], None] | None = None  # called once the whole answer is written
        self._open = set(range(len(choices)))
        self._started: set[int] = set()
        self._begun = time.perf_counter()
        self._times: dict[int, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = self._stream(send) if self._is_stream else self._collect(scope, receive, send)
        work = asyncio.ensure_future(run)
        gone = asyncio.ensure_future(_gone(receive))
        try:
            self._rows.submit()
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                work.result()
            elif self._open:
                self._metrics.count_cancelled("disconnect")
            # A client that has all of its answer counts as gone, too.
            if self.on_end is not None and work.done() and work.exception() is None:
                self.on_end()
        finally:
            self._rows.cancel()
            await _end(work, gone)
            self._log()

    async def _collect(self, scope: Scope, receive: Receive, send: Send) -> None:
        while self._open:
            for index, event in await self._rows.next():
                self._take(index, event)
        body = self._writer.whole(self._choices)
        await json_response(body)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        # A failure here still has a status; a client that waits longer wants to hear that it waits.
        arrived = await self._rows.next(self._ping_seconds)
        if arrived and (error := self._refusal(*arrived[0])) is not None:
            raise error
        headers = [(k.lower().encode(), v.encode()) for k, v in sse.HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while self._open:
                await _send(send, self._written(arrived) if arrived else [self._writer.ping])
                if self._open:
                    arrived = await self._rows.next(self._ping_seconds)
            last = self._writer.end(self._choices)
        except Exception as error:
            self._metrics.count_failed(error)
            if not isinstance(error, InputError):
                log_failure(self._identity, error)
            last = self._writer.fail(describe(error))
        await _send(send, last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _written(self, arrived: list[tuple[int, Event]]) -> list[bytes]:
        """Return what a stream says about events. Raises the error of a row that failed."""
        written: list[bytes] = []
        for index, event in arrived:
            if index not in self._open:
                continue
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
        """Add an event to its row; return what is certain now. Rows that ended leave `_open`.

        Raises the error of a row that failed.
        """
        if index not in self._open:
            return []
        if (error := self._refusal(index, event)) is not None:
            raise error
        choice = self._choices[index]
        parts = self._add(index, choice, event)
        if choice.reason is not None:
            self._open.discard(index)
            self._rows.cancel_row(
                index
            )  # the engine does not know where the answer ended by what it says
            self._metrics.finished(choice.reason, time.perf_counter() - self._begun)
        return parts

    def _add(self, index: int, choice: Choice, event: Event) -> list[Part]:
        if isinstance(event, Started):
            self._started.add(index)
            choice.start(event, len(self._rows.requests[index].ids))
            self._metrics.started(time.perf_counter() - self._begun)
        elif isinstance(event, Scored):
            choice.score(event)
        elif isinstance(event, Token):
            self._note_time(index)
            return choice.push(event)
        elif isinstance(event, Finished):
            return choice.finish(event)
        return []

    def _refusal(self, index: int, event: Event) -> Exception | None:
        """Return the error of a row that failed, or that waited for its turn until it was dropped."""
        if isinstance(event, Failed):
            return event.error
        is_dropped = isinstance(event, Finished) and event.reason == "cancelled"
        if is_dropped and index not in self._started:
            return RequestError(
                "the request waited too long for its turn", status=503, code="queue_timeout"
            )
        return None

    def _note_time(self, index: int) -> None:
        now = time.perf_counter()
        before = self._times.get(index)
        self._times[index] = now
        if before is None:
            self._metrics.first_token(now - self._begun)
        else:
            self._metrics.next_token(now - before)

    def _log(self) -> None:
        for index, choice in enumerate(self._choices):
            usage = choice.usage
            log.info(
                "%s row %d: %d prompt tokens, %d of them cached, %d new, %s",
                self._identity,
                index,
                usage.prompt_tokens,
                usage.cached_tokens,
                choice.new_tokens,
                choice.reason or "given up",
            )


async def _end(*tasks: asyncio.Future[None]) -> None:
    """Cancel tasks and wait until they have ended; what they raise then interests nobody."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _send(send: Send, written: Iterable[bytes]) -> None:
    if body := b"".join(written):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _gone(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
