"""Bound what a `tokenizer.json` may ask of the library that reads it.

The library trusts the file: it ends the process when memory runs out, and a small file can make it
run out of memory or time, by texts that grow at every step, patterns that backtrack without end, or long
lists that repeat. Such files are refused before the library sees them. No published tokenizer of the
family comes near the bounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, cast

from q35c.errors import TokenizerError
from q35c.limits import MAX_TOKENIZER_BYTES

MAX_GROWTH = 16  # of a text, by all steps of a part together
MAX_STEPS = 16  # of a part, nested ones included
MAX_ADDED_BYTES = 256 << 10
MAX_TEXT = 256  # of an added token, a prefix or a replacement
MAX_PATTERN = 2000
MAX_FRAME = 64  # tokens put around a text
_MAX_ITEMS, _MAX_DEPTH, _MAX_NUMBER = 1000, 12, 1 << 24
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")
# A repeated group may backtrack exponentially; so may several unbounded repetitions in a row polynomially.
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")
_REPETITION = re.compile(r"(?<!\\)[*+]|\{\d*,\}")
_MAX_REPETITIONS = 3  # in one alternative
_MAX_COUNT = 100


def check_tokenizer(document: bytes) -> None:
    """Raise TokenizerError for a file that could take memory or time out of proportion."""
    if len(document) > MAX_TOKENIZER_BYTES:
        raise _refused("is too large", f"at most {MAX_TOKENIZER_BYTES} bytes", len(document))
    try:
        tree = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"tokenizer.json cannot be used: {error}"[:300]) from None
    if not isinstance(tree, dict):
        raise _refused("is no object", "an object", type(tree).__name__)
    fields = cast(dict[str, Any], tree)
    _check_added(fields.get("added_tokens"))
    _check_model(fields.get("model"))
    for part in _PARTS:
        _check_sizes(fields.get(part), part)
        steps = list(_steps(fields.get(part)))
        if len(steps) > MAX_STEPS:
            raise _refused(f"has too many steps in its {part}", f"at most {MAX_STEPS}", len(steps))
        growth = 1.0
        for step in steps:
            growth *= _growth(step, part)
        if growth > MAX_GROWTH:
            raise _refused(
                f"makes texts grow in its {part}", f"{MAX_GROWTH} times", f"{growth:.3g}"
            )
    frame = sum(map(_frame, _steps(fields.get("post_processor"))))
    if frame > MAX_FRAME:
        raise _refused("puts too many tokens around a text", f"at most {MAX_FRAME}", frame)


def _refused(what: str, expected: object, got: object) -> TokenizerError:
    return TokenizerError(f"tokenizer.json {what}", expected=expected, got=got)


def _check_added(tokens: Any) -> None:
    size = 0
    for token in _list(tokens):
        content = _fields(token).get("content")
        if isinstance(content, str):
            if len(content) > MAX_TEXT:
                raise _refused("has a long added token", f"{MAX_TEXT} characters", len(content))
            size += len(content.encode("utf-8", "replace"))
    if size > MAX_ADDED_BYTES:
        raise _refused("has too many added tokens", f"at most {MAX_ADDED_BYTES} bytes", size)


def _check_model(model: Any) -> None:
    if isinstance(model, dict):
        fields = cast(dict[str, Any], model)
        _check_sizes({k: v for k, v in fields.items() if k not in ("vocab", "merges")}, "model")


def _check_sizes(value: Any, part: str, depth: int = 0) -> None:
    """Refuse nesting, lists, numbers and texts that no tokenizer needs."""
    if depth > _MAX_DEPTH:
        raise _refused(f"nests its {part} too deeply", _MAX_DEPTH, "more")
    if isinstance(value, (list, dict)):
        items = cast(dict[Any, Any] | list[Any], value)
        if len(items) > _MAX_ITEMS:
            raise _refused(f"has too long a list in its {part}", _MAX_ITEMS, len(items))
        for item in items.values() if isinstance(items, dict) else items:
            _check_sizes(item, part, depth + 1)
    elif isinstance(value, str) and len(value) > MAX_PATTERN:
        raise _refused(f"has too long a text in its {part}", MAX_PATTERN, len(value))
    elif isinstance(value, int) and not -_MAX_NUMBER <= value <= _MAX_NUMBER:
        raise _refused(f"has too large a number in its {part}", _MAX_NUMBER, str(value)[:40])


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part, out of its sequences."""
    if not isinstance(part, dict):
        return
    fields = cast(dict[str, Any], part)
    nested = [name for name in _LISTS if isinstance(fields.get(name), list)]
    if not nested:
        yield fields
    for name in nested:
        for step in fields[name]:
            yield from _steps(step)


def _growth(step: dict[str, Any], part: str) -> float:
    """Return how many times as long a step may make a text; check its texts and pattern."""
    kind = step.get("type")
    if kind == "Precompiled":  # a table from characters to texts of any length
        raise _refused(f"has a compiled table in its {part}", "rules that can be read", kind)
    pattern = step.get("pattern")
    wrapped = cast(dict[str, Any], pattern) if isinstance(pattern, dict) else {}
    regex = wrapped.get("Regex")
    if isinstance(regex, str):
        _check_pattern(regex, part)
    for name, value in step.items():
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise _refused(f"has a long {name!r} in its {part}", MAX_TEXT, len(value))
    if kind == "ByteLevel":  # writes a byte as a character of up to two
        return 1.0 if part == "post_processor" else 2.0
    if kind == "Replace":
        literal = wrapped.get("String")
        length = len(literal.encode("utf-8", "replace")) if isinstance(literal, str) else 0
        content = str(step.get("content", "")).encode("utf-8", "replace")
        # An empty match stands between any two characters.
        return max(1.0, len(content) / length if length else len(content) + 1.0)
    return 1.0


def _check_pattern(pattern: str, part: str) -> None:
    counts = [
        int(number)
        for number in re.findall(r"\{(\d{1,9})|,(\d{1,9})\}", pattern)
        for number in number
        if number
    ]
    longest = max(len(_REPETITION.findall(choice)) for choice in pattern.split("|"))
    is_bad = _REPEATED_GROUP.search(pattern) or longest > _MAX_REPETITIONS
    if is_bad or len(pattern) > MAX_PATTERN or max(counts, default=0) > _MAX_COUNT:
        raise _refused(
            f"has a pattern that may run for long in its {part}",
            "plain repetitions",
            repr(pattern[:80]),
        )


def _fields(value: Any) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else []


def _frame(step: dict[str, Any]) -> int:
    """Return the tokens that a post-processor puts around one text or two."""
    tokens = step.get("special_tokens")
    sizes = {name: len(_list(_fields(x).get("ids"))) for name, x in _fields(tokens).items()}
    total = sum(sizes.values())
    for name in ("single", "pair"):
        for piece in _list(step.get(name)):
            special = _fields(_fields(piece).get("SpecialToken"))
            total += sizes.get(str(special.get("id")), 1)
    return total
