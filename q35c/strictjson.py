"""Read JSON that may be hostile.

Python's `json` silently accepts duplicate keys, NaN, integers of any length, lone surrogates and
nesting up to the recursion limit. This reader refuses them, checks size, depth and the number of
values before anything is built, and names the place inside the document.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from q35c.errors import Q35CError

MAX_DEPTH = 32
MAX_VALUES = 50_000
_INT64 = range(-(2**63), 2**63)
_MAX_DIGITS = 20

# Strings, runs of brackets, commas. A string that is never closed is swallowed up to the end, so that
# the scan stays linear.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{]+|[\]}]+|,', re.DOTALL)


class _Refused:
    """Stand in the parsed tree for a value that must not be used."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def loads(
    data: bytes,
    *,
    where: str,
    limit: int,
    error: type[Q35CError],
    max_values: int = MAX_VALUES,
    max_depth: int = MAX_DEPTH,
    has_long_integers: bool = False,
) -> Any:
    """Parse one JSON document strictly.

    `limit` is the size cap in bytes and `max_values` and `max_depth` cap the values in the
    document and their nesting; `where` names the document in messages. With `has_long_integers` those beyond
    64 bits become floats. Raises `error` for anything malformed, ambiguous or too large.
    """
    if len(data) > limit:
        raise error(
            "JSON document is too large",
            where=where,
            expected=f"at most {limit} bytes",
            got=len(data),
        )
    _check_structure(data, where, error, max_values, max_depth)
    refused: list[_Refused] = []
    try:
        tree = json.loads(data.decode("utf-8"), **_hooks(refused, has_long_integers))
    except UnicodeDecodeError as bad:
        raise error("JSON is not UTF-8", where=where, got=f"byte {bad.start}") from None
    except (ValueError, RecursionError) as bad:
        raise error(f"malformed JSON: {bad}", where=where) from None
    if refused or re.search(rb"\\[uU][dD]", data):
        for path, reason in _refusals(tree, "$"):
            raise error(reason, where=f"{where} at {path}")
    return tree


def dumps(value: Any) -> bytes:
    """Write the canonical form: sorted keys, no spaces, no NaN, ASCII only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _check_structure(
    data: bytes, where: str, error: type[Q35CError], max_values: int, max_depth: int
) -> None:
    """Bound depth and number of values by counting brackets and commas outside strings."""
    depth, values = 0, 1
    for match in _TOKEN.finditer(data):
        start, length = data[match.start()], match.end() - match.start()
        if start == ord('"'):
            continue
        if start in b"]}":
            depth -= length
            continue
        depth += length if start in b"[{" else 0
        values += length
        if depth > max_depth:
            raise error("JSON is nested too deeply", where=where, expected=f"{max_depth} levels")
        if values > max_values:
            raise error("JSON holds too many values", where=where, expected=f"at most {max_values}")


def _hooks(refused: list[_Refused], has_long_integers: bool) -> dict[str, Any]:
    """Return the `json.loads` hooks; every refusal is also appended to `refused`."""

    def refuse(reason: str) -> _Refused:
        refused.append(_Refused(reason))
        return refused[-1]

    def integer(text: str) -> float | _Refused:
        if len(text) <= _MAX_DIGITS and int(text) in _INT64:
            return int(text)
        return real(text) if has_long_integers else refuse("integer does not fit 64 bits")

    def real(text: str) -> float | _Refused:
        value = float(text)
        return value if math.isfinite(value) else refuse("number overflows a double")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any] | _Refused:
        made = dict(items)
        if len(made) == len(items):
            return made
        key, _ = Counter(key for key, _ in items).most_common(1)[0]
        return refuse(f"duplicate key {key[:80]!r}")

    def constant(text: str) -> _Refused:
        return refuse(f"{text} is not JSON")

    return {
        "parse_int": integer,
        "parse_float": real,
        "parse_constant": constant,
        "object_pairs_hook": pairs,
    }


def _refusals(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path, reason) for every refused value and every string that is not Unicode text."""
    if isinstance(tree, _Refused):
        yield path, tree.reason
    elif isinstance(tree, str):
        if not _is_text(tree):
            yield path, "string holds a lone surrogate"
    elif isinstance(tree, list):
        for index, item in enumerate(tree):
            yield from _refusals(item, f"{path}[{index}]")
    elif isinstance(tree, dict):
        for key, item in tree.items():
            if not _is_text(key):
                yield path, "key holds a lone surrogate"
            yield from _refusals(item, f"{path}.{ascii(key[:80])[1:-1]}")


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
