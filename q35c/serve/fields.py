"""Take typed values out of a request's JSON: known fields have a type and a range, others are counted.

Absent and null are the same: None. A value of a wrong type or outside its range raises OptionError that names
the field by its path in the body.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from q35c import arguments
from q35c.errors import OptionError, RequestError


class Fields:
    """One object of a request."""

    def __init__(self, document: Any, where: str = "") -> None:
        if not isinstance(document, dict):
            raise OptionError(
                "must be a JSON object", where=where or None, expected='{"field": value}'
            )
        self._document: dict[str, Any] = document
        self._where = where
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        """Return a field's path in the body."""
        return f"{self._where}.{name}" if self._where else name

    def value(self, name: str) -> Any:
        """Return a field as it is, None if there is none."""
        self._read.add(name)
        return self._document.get(name)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.value(name)
        return None if value is None else arguments.integer(self.path(name), value, low, high)

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.value(name)
        return None if value is None else arguments.real(self.path(name), value, low, high)

    def flag(self, name: str) -> bool | None:
        value = self.value(name)
        return None if value is None else arguments.flag(self.path(name), value)

    def text(self, name: str, most: int = 1 << 25, least: int = 0) -> str | None:
        """Return a text of `least` to `most` characters."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, str) or not least <= len(value) <= most:
            raise OptionError(
                "value is not allowed",
                where=self.path(name),
                expected=f"a text of {least} to {most} characters",
            )
        return value

    def choice(self, name: str, known: Sequence[str]) -> str | None:
        value = self.text(name, 100)
        if value is not None and value not in known:
            raise OptionError(
                "value is not known", where=self.path(name), expected=", ".join(known)
            )
        return value

    def items(self, name: str, most: int) -> list[Any] | None:
        """Return a list of at most `most` values."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > most:
            raise OptionError(
                "value is not allowed",
                where=self.path(name),
                expected=f"a list of at most {most} items",
            )
        return value

    def objects(self, name: str, most: int) -> list[Fields] | None:
        """Return a list of objects."""
        listed = self.items(name, most)
        if listed is None:
            return None
        return [Fields(item, f"{self.path(name)}[{index}]") for index, item in enumerate(listed)]

    def nested(self, name: str) -> Fields | None:
        """Return an object."""
        value = self.value(name)
        return None if value is None else Fields(value, self.path(name))

    def require(self, name: str, value: Any) -> Any:
        """Return a field's value that must be there. Raises OptionError if it is None."""
        if value is None:
            raise OptionError("the field is missing", where=self.path(name))
        return value

    def refuse(self, name: str, why: str) -> None:
        """Raise RequestError if a field is there that q35c does not do."""
        if self.value(name) is not None:
            raise RequestError(why, where=self.path(name))

    def count_unread(self) -> int:
        """Return how many fields nobody has read."""
        return len(self._document.keys() - self._read)

    @property
    def document(self) -> Mapping[str, Any]:
        """Return the whole object."""
        return self._document
