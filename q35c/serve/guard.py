"""What uvicorn leaves open between a socket and the application: slow, endless and ambiguous requests.

A connection has ten seconds to say what it wants, in 16 KiB and 100 lines of which none is open to two readings;
one whose client does not read what it asked for is dropped.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from q35c.serve.settings import (
    HEAD_SECONDS,
    MAX_CONNECTIONS,
    MAX_HEAD_BYTES,
    MAX_HEAD_LINES,
    WRITE_SECONDS,
)

_BARE_LINE_END = re.compile(rb"(?<!\r)\n")
_FOLDED = re.compile(rb"\n[ \t]")
_LENGTH = re.compile(rb"\ncontent-length[ \t]*:", re.IGNORECASE)
_CODING = re.compile(rb"\ntransfer-encoding[ \t]*:", re.IGNORECASE)


class StrictConnection(h11.Connection):
    """h11 without the heads that another server in front of us might read in another way."""

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            _check_head(self.trailing_data[0])
        return super().next_event()


def _check_head(data: bytes) -> None:
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES + 4)
    head = data[: end if end >= 0 else MAX_HEAD_BYTES + 1]
    if len(head) > MAX_HEAD_BYTES:
        raise h11.RemoteProtocolError("head is too large", error_status_hint=431)
    if head.count(b"\n") > MAX_HEAD_LINES:
        raise h11.RemoteProtocolError("too many header lines", error_status_hint=431)
    if _BARE_LINE_END.search(head):
        raise h11.RemoteProtocolError("a line ends without a carriage return")
    if _FOLDED.search(head):
        raise h11.RemoteProtocolError("a header goes on in the next line")
    lengths, codings = len(_LENGTH.findall(head)), len(_CODING.findall(head))
    if lengths + codings > 1:
        raise h11.RemoteProtocolError("the length is given more than once")


class GuardedProtocol(H11Protocol):
    """One connection."""

    head_seconds, write_seconds, most_connections = HEAD_SECONDS, WRITE_SECONDS, MAX_CONNECTIONS

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = StrictConnection(h11.SERVER, MAX_HEAD_BYTES)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _cancelled(self._head_timer)
        self._write_timer = _cancelled(self._write_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # Also behind an answer that did not wait for the request's end: what is left is read for as long as a head.
        if self._is_idle():
            self._await_head()
        super().data_received(data)
        if not self._is_idle():
            self._head_timer = _cancelled(self._head_timer)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # perhaps begins with a request that came behind
        if not self._is_idle():
            self._head_timer = _cancelled(self._head_timer)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._await_reader()  # closing waits for what was not yet read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        self._write_timer = _cancelled(self._write_timer)
        super().resume_writing()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _await_reader(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_seconds, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
