"""Bring the engine's events into the event loop, for one reader that may be slow or gone.

The engine thread never waits for a client: it posts, and the loop is woken once for all that was posted since it
last looked. A reader that leaves too much unread for too long has its rows cancelled.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections import deque
from collections.abc import Sequence

from q35c.errors import RequestError
from q35c.serve.request import Event, Failed, Finished, Request, Serving, Ticket
from q35c.serve.settings import MAX_WAITING_EVENTS


class Inbox:
    """What the engine has posted and the loop has not yet handed to the rows."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._posted: list[tuple[Rows, int, list[Event]]] = []
        self._is_woken = False

    def post(self, rows: Rows, index: int, events: list[Event]) -> None:
        """Take events of a row, from the engine thread."""
        with self._lock:
            self._posted.append((rows, index, events))
            if self._is_woken:
                return
            self._is_woken = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            if not self._loop.is_closed():  # ended by force, and nobody is left to read
                raise

    def _deliver(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
            self._is_woken = False
        for rows, index, events in posted:
            rows.deliver(index, events)


class Rows:
    """The rows of one answer. Lives in the event loop; `cancel` when done, whatever happened."""

    def __init__(
        self, engine: Serving, inbox: Inbox, requests: Sequence[Request], unread_seconds: float
    ) -> None:
        self._engine, self._inbox = engine, inbox
        self.requests = requests
        self._open: dict[int, Ticket] = {}
        self._arrived: deque[tuple[int, Event]] = deque()
        self._has_arrived = asyncio.Event()
        self._most = MAX_WAITING_EVENTS * len(requests)
        self._unread_seconds = unread_seconds
        self._read_at = time.monotonic()
        self._is_ended = False

    def submit(self) -> None:
        """Hand all requests to the engine, or none. Raises Overloaded, Unavailable."""
        try:
            for index, request in enumerate(self.requests):
                post = functools.partial(self._post, index)
                self._open[index] = self._engine.submit(request, post)
        except BaseException:
            self.cancel()
            raise

    def deliver(self, index: int, events: list[Event]) -> None:
        """Take events of a row, in the event loop."""
        if self._is_ended:
            return
        self._arrived.extend((index, event) for event in events)
        if events and isinstance(events[-1], (Finished, Failed)):
            self._open.pop(index, None)
        is_late = time.monotonic() - self._read_at > self._unread_seconds
        if is_late and len(self._arrived) > self._most:
            self.cancel()
            self._arrived.clear()
            self._arrived.append((index, Failed(RequestError("nobody reads this answer"))))
        self._has_arrived.set()

    async def next(self, seconds: float | None = None) -> list[tuple[int, Event]]:
        """Return the events that have arrived; none after `seconds` without any."""
        if not self._arrived:
            try:
                async with asyncio.timeout(seconds):
                    await self._has_arrived.wait()
            except TimeoutError:
                return []
        self._has_arrived.clear()
        self._read_at = time.monotonic()
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    def cancel_row(self, index: int) -> None:
        """End one row; what it still says is for its reader to ignore."""
        if (ticket := self._open.pop(index, None)) is not None:
            self._engine.cancel(ticket)

    def cancel(self) -> None:
        """End all rows that have not ended, and take nothing more from them."""
        self._is_ended = True
        for index in list(self._open):
            self.cancel_row(index)

    def _post(self, index: int, request: Request, events: list[Event]) -> None:
        self._inbox.post(self, index, events)
