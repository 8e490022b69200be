"""Server-sent events, written by hand: nothing but lines."""

from __future__ import annotations

import json
from typing import Any

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # asks reverse proxies to pass every event on at once
}
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def dump(document: Any) -> bytes:
    """Return a value as JSON in UTF-8, on one line."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def data(document: Any) -> bytes:
    """Return an event without a name."""
    return b"data: " + dump(document) + b"\n\n"


def named(name: str, document: Any) -> bytes:
    """Return an event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + dump(document) + b"\n\n"
