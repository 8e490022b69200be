"""Values of a tool call's arguments: from the text that a model writes to JSON, by the tool's schema.

A model writes every value as bare text, so only the schema tells the text `12` from the number. What does not
fit its schema is passed on as text: the call is the caller's to judge, and never lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol, cast

from q35c import strictjson
from q35c.errors import OptionError

ANY = "any"
MAX_REFERENCES = 8
MAX_VALUE_BYTES = 16 << 20
_NULLS = ("null", "None")  # JSON's, and how templates write it into the history
_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}
_STRINGS_ONLY = frozenset({"string"})
_STRING_OR_NULL = frozenset({"string", "null"})


class Value(Protocol):
    """A value that arrives in pieces of text and leaves in pieces of JSON."""

    def push(self, text: str) -> str:
        """Add text; return the JSON that is certain now."""
        ...

    def finish(self) -> str:
        """End the value; return the rest of its JSON."""
        ...


class _Text:
    """A value that is text whatever it says, written while it arrives."""

    def __init__(self) -> None:
        self._open = '"'

    def push(self, text: str) -> str:
        opening, self._open = self._open, ""
        return opening + json.dumps(text, ensure_ascii=False)[1:-1]

    def finish(self) -> str:
        return self._open + '"'


class _TextOrNull:
    """A value that is text unless it says null, which its beginning mostly tells."""

    def __init__(self) -> None:
        self._text = _Text()
        self._held: str | None = ""

    def push(self, text: str) -> str:
        if self._held is None:
            return self._text.push(text)
        self._held += text
        said = self._held.strip()
        if any(null.startswith(said) for null in _NULLS) and len(self._held) < 64:
            return ""
        held, self._held = self._held, None
        return self._text.push(held)

    def finish(self) -> str:
        if self._held is None:
            return self._text.finish()
        if self._held.strip() in _NULLS:
            return "null"
        return self._text.push(self._held) + self._text.finish()


class _Whole:
    """A value that must be known to its end before anything can be written."""

    def __init__(self, types: frozenset[str]) -> None:
        self._types, self._pieces = types, list[str]()

    def push(self, text: str) -> str:
        self._pieces.append(text)
        return ""

    def finish(self) -> str:
        return json.dumps(convert("".join(self._pieces), self._types), ensure_ascii=False)


class Ignored:
    """A value that nobody gets."""

    def push(self, text: str) -> str:
        """Add text; return nothing."""
        return ""

    def finish(self) -> str:
        """Return nothing."""
        return ""


def value_of(schema: Any, root: Any) -> Value:
    """Return an empty value of a schema that is part of `root`."""
    types = types_of(schema, root)
    if types == _STRINGS_ONLY:
        return _Text()
    return _TextOrNull() if types == _STRING_OR_NULL else _Whole(types)


def convert(text: str, types: frozenset[str]) -> Any:
    """Return the JSON value that a text stands for; the text itself where it is none of these types."""
    if types == _STRINGS_ONLY:
        return text
    said = text.strip()
    if "null" in types and said in _NULLS:
        return None
    if "boolean" in types and said in _BOOLEANS:
        return _BOOLEANS[said]
    value = _parsed(said)
    kind = _kind(value)
    if kind == "string":
        return text
    if kind in types or (kind == "integer" and "number" in types):
        return value
    if kind == "number" and "integer" in types and value == int(value) and abs(value) < 2**63:
        return int(value)
    return value if ANY in types and kind in ("object", "array") else text


def types_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """Return the names of the JSON types that a schema allows, `ANY` among them where it does not say.

    `root` is the document that references of the schema point into.
    """
    if not isinstance(schema, Mapping) or depth > MAX_REFERENCES:
        return frozenset({ANY})
    rules = cast(Mapping[str, Any], schema)
    if "$ref" in rules:
        return types_of(_referred(rules["$ref"], root), root, depth + 1)
    found: set[str] = set()
    if "type" in rules:
        names = rules["type"]
        listed = cast(list[Any], names) if isinstance(names, list) else [names]
        found.update(name for name in listed if isinstance(name, str))
    else:
        for word in ("anyOf", "oneOf", "allOf"):
            for part in _listed(rules.get(word)):
                found |= types_of(part, root, depth + 1) - ({ANY} if word == "allOf" else set())
        found.update(map(_kind, _listed(rules.get("enum"))))
        if "const" in rules:
            found.add(_kind(rules["const"]))
    if found and rules.get("nullable") is True:
        found.add("null")
    return frozenset(found or {ANY})


def _listed(value: Any) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else []


def _referred(reference: Any, root: Any) -> Any:
    """Return what a reference within the document points at, None if there is nothing."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = cast(Mapping[str, Any], found).get(name) if isinstance(found, Mapping) else None
    return found


def _kind(value: Any) -> str:
    """Return the JSON type of a value."""
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"))
    found = next((name for kind, name in kinds if isinstance(value, kind)), None)
    return found or ("array" if isinstance(value, list) else "object")


def _parsed(text: str) -> Any:
    """Return the JSON value of a text; the text itself if it is no JSON that everybody reads alike."""
    try:
        data = text.encode("utf-8", "surrogatepass")
        return strictjson.loads(data, where="value", limit=MAX_VALUE_BYTES, error=OptionError)
    except OptionError:
        return text
