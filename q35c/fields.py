"""Take typed values out of a JSON object; whatever is left over at the end is an unknown key."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from q35c.errors import ConfigError, UnsupportedConfig

_REQUIRED: Any = object()


class Fields:
    """Read each key once, checking its type and range; `finish` refuses the keys nobody read.

    A wrong type or range raises ConfigError, a value or key that is not implemented
    UnsupportedConfig; both name the key.
    """

    def __init__(self, document: Any, where: str) -> None:
        if not isinstance(document, dict):
            raise ConfigError("must be a JSON object", where=where, got=_name(document))
        self._left: dict[str, Any] = dict(document)
        self._where = where

    def _take(self, key: str, default: Any) -> Any:
        value = self._left.pop(key, default)
        if value is _REQUIRED:
            raise ConfigError(f"missing key {key!r}", where=self._where)
        return value

    def _fail(self, key: str, expected: str, value: Any) -> ConfigError:
        shown = f"{value!r:.80} ({_name(value)})"
        return ConfigError(f"bad value of {key!r}", where=self._where, expected=expected, got=shown)

    def integer(self, key: str, low: int, high: int, default: Any = _REQUIRED) -> Any:
        """Return an int in [low, high]; a bool is not an int."""
        value = self._take(key, default)
        if value is default:
            return value
        if type(value) is not int or not low <= value <= high:
            raise self._fail(key, f"an integer from {low} to {high}", value)
        return value

    def number(self, key: str, low: float, high: float, default: Any = _REQUIRED) -> Any:
        """Return a finite float in [low, high]; an int is converted, a bool refused."""
        value = self._take(key, default)
        if value is default:
            return value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (math.isfinite(value) and low <= value <= high):
            raise self._fail(key, f"a number from {low} to {high}", value)
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._take(key, default)
        if value is default:
            return value
        if type(value) is not bool:
            raise self._fail(key, "true or false", value)
        return value

    def choice(self, key: str, allowed: Collection[str]) -> str:
        """Return a string; one outside `allowed` is unsupported."""
        value = self._take(key, _REQUIRED)
        if type(value) is not str:
            raise self._fail(key, f"one of {', '.join(allowed)}", value)
        if value not in allowed:
            raise UnsupportedConfig(
                f"{key} {value!r:.80} is not supported",
                where=self._where,
                expected=f"one of {', '.join(allowed)}",
            )
        return value

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        value = self._take(key, _REQUIRED)
        if type(value) is not list:
            raise self._fail(key, "a list of integers", value)
        for item in value:
            if type(item) is not int or not low <= item <= high:
                raise self._fail(key, f"integers from {low} to {high}", item)
        return tuple(value)

    def texts(self, key: str, allowed: Collection[str], most: int) -> tuple[str, ...]:
        """Return a list of at most `most` strings; one outside `allowed` is unsupported."""
        value = self._take(key, _REQUIRED)
        if type(value) is not list or len(value) > most:
            raise self._fail(key, f"a list of at most {most} strings", value)
        return tuple(Fields({key: item}, self._where).choice(key, allowed) for item in value)

    def nested(self, key: str) -> Fields:
        return Fields(self._take(key, _REQUIRED), f"{self._where} at {key}")

    def finish(self) -> None:
        """Refuse the keys that nobody read."""
        for key in self._left:
            raise UnsupportedConfig(f"unknown key {key!r:.80}", where=self._where)


def _name(value: Any) -> str:
    return {type(None): "null", dict: "object", list: "array"}.get(
        type(value), type(value).__name__
    )
