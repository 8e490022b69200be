"""Requests that clients send, with the texts and lists that files do not hold in full."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
_MAKERS = ("$text", "$repeat", "$range", "$map", "$join", "$nest")
_TEXT = re.compile(r"<text of (\d+) characters>")


def load(name: str) -> list[dict[str, Any]]:
    lines = (DATA / name).read_text().splitlines()
    return [expand(json.loads(line)) for line in lines]


def expand(value: Any) -> Any:
    """Return a value with everything made that stands for something long."""
    if isinstance(value, dict):
        if len(value) == 1 and (key := next(iter(value))) in _MAKERS:
            return _make(key, value[key])
        return {key: expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item) for item in value]
    if isinstance(value, str):
        return _TEXT.sub(lambda found: ("word " * (int(found[1]) // 5 + 1))[: int(found[1])], value)
    return value


def _make(kind: str, arguments: Any) -> Any:
    first, *rest = arguments
    if kind == "$text":
        return first * rest[0]
    if kind == "$repeat":
        return [expand(first)] * rest[0]
    if kind == "$range":
        return [first % index for index in range(rest[0])]
    if kind == "$map":
        return {first % index: rest[1] for index in range(rest[0])}
    if kind == "$join":
        return "".join(expand(part) for part in arguments)
    assert kind == "$nest"
    made: Any = dict(first)
    for _ in range(rest[1]):
        made = {**first, rest[0]: made}
    return made
