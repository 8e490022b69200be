"""What the public functions accept: one rule for each kind of argument, and an error that names it.

Every rule returns the argument in its plain form. Numbers may be of any integer or float type, those of numpy
and scalars of other array libraries included; True and False are no numbers.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from q35c.errors import OptionError, Q35CError

T = TypeVar("T")
MOST_ITEMS = 1 << 24  # of any list
_PATH_MAX, _NAME_MAX = 4096, 255  # bytes that Linux allows
_HINTS: tuple[tuple[Any, str], ...] = (
    (Mapping, "give the value that is meant, such as tokens['input_ids']"),
    ((bytes, bytearray, memoryview), "decode bytes to text first"),
    ((Set, Iterable), "make it a list first"),
)


def integer(
    name: str, value: Any, low: int, high: int | None = None, *, expected: str | None = None
) -> int:
    """Return an integer within bounds, both included. Raises OptionError."""
    number = index_of(value)
    if number is None or number < low or (high is not None and number > high):
        bounds = f"{low} or more" if high is None else f"{low} to {high}"
        _refuse(name, value, expected or f"an integer, {bounds}")
    return number


def real(name: str, value: Any, low: float, high: float) -> float:
    """Return a number within bounds, both included; NaN is not. Raises OptionError."""
    number = _scalar(value)
    if (
        isinstance(number, bool)
        or not isinstance(number, Real)
        or not low <= cast(Any, number) <= high
    ):
        _refuse(name, value, f"a number, {low:g} to {high:g}")
    return float(number)


def flag(name: str, value: Any) -> bool:
    """Return True or False. Raises OptionError for what is merely true or false in an `if`."""
    value_ = _scalar(value)
    if not isinstance(value_, bool):
        _refuse(name, value, "True or False")
    return value_


def text(name: str, value: Any) -> str:
    """Return a text that can be written as UTF-8. Raises OptionError."""
    if not isinstance(value, str):
        _refuse(name, value, "a text")
    if (at := surrogate_at(value)) is not None:
        raise OptionError("not UTF-8", where=name, got=f"{value[at]!r} at character {at}")
    return value


def choice(name: str, value: Any, known: Sequence[str], what: str) -> str:
    """Return one of the known texts. Raises OptionError that lists them."""
    if not isinstance(value, str) or value not in known:
        raise OptionError(
            f"unknown {what}",
            where=name,
            expected=", ".join(known),
            got=value,
            hint=close_match(value, known),
        )
    return value


def close_match(value: Any, known: Sequence[str]) -> str | None:
    """Return a question about what was probably meant, None where nothing is like it."""
    import difflib  # only a mistake pays for it

    is_short = isinstance(value, str) and len(value) < 100
    found = difflib.get_close_matches(value, known, 1) if is_short else []
    return f"did you mean {found[0]!r}?" if found else None


def path(name: str, value: Any) -> Path:
    """Return a path that the system could know: not empty or too long, no NUL in it. Raises OptionError."""
    if not isinstance(value, (str, os.PathLike)):
        _refuse(name, value, "a path")
    try:
        place = os.fspath(cast(Any, value))
        longest = max(map(len, os.fsencode(place).split(b"/")))
        is_possible = "\0" not in place and place != ""
        if is_possible and (len(place) >= _PATH_MAX or longest > _NAME_MAX):
            _refuse(name, place, f"no name too long: {_NAME_MAX} bytes each, {_PATH_MAX} in all")
    except (TypeError, ValueError):  # a path of bytes, and text that no file name can be
        is_possible = False
    if not is_possible:
        _refuse(name, value, "a path")
    return Path(place)


def callback(name: str, value: T) -> T:
    """Return a function or None. Raises OptionError."""
    if value is not None and not callable(value):
        _refuse(name, value, "a function, or None")
    return value


def instance(name: str, value: Any, kind: type[T]) -> T:
    """Return an object of q35c's own. Raises OptionError."""
    if not isinstance(value, kind):
        _refuse(name, value, f"a {kind.__name__}")
    return value


def sequence(
    name: str | None,
    value: Any,
    expected: str,
    *,
    most: int = MOST_ITEMS,
    error: type[Q35CError] = OptionError,
) -> list[Any]:
    """Return the items of a list, tuple, other sequence or array. Raises `error`.

    Text, bytes, mappings, sets and iterators are none: to read them item by item is hardly ever what is meant.
    """
    if not is_sequence(value):
        hint = next((hint for kinds, hint in _HINTS if isinstance(value, kinds)), None)
        raise error(
            f"a {type(value).__name__} is not allowed here",
            where=name,
            expected=expected,
            got=value,
            hint=None if isinstance(value, str) else hint,
        )
    count = _length(value)
    if count > most:
        raise error("too many items", where=name, expected=f"at most {most}", got=count)
    return list(value) if isinstance(value, Sequence) else value.tolist()


def is_sequence(value: Any) -> bool:
    """Say whether something is a list of things: a sequence, or an array that has an axis."""
    if isinstance(value, (int, str, bytes, bytearray, memoryview)):
        return False
    if isinstance(value, Sequence):
        return True
    axes = getattr(value, "ndim", 0)  # of numpy, torch and their kin
    return isinstance(axes, int) and axes > 0 and callable(getattr(value, "tolist", None))


def index_of(value: Any) -> int | None:
    """Return the integer that something is, None if it is none. True and False are none."""
    number = _scalar(value)
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        return None
    try:
        return operator.index(number)
    except TypeError:  # an array has the method, too
        return None


def surrogate_at(value: str) -> int | None:
    """Return where a text holds what UTF-8 cannot say, None if nowhere."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _scalar(value: Any) -> Any:
    """Return a scalar of an array library as Python's own number."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


def _length(value: Any) -> float:
    try:
        return len(value)
    except OverflowError:  # a range beyond what memory can address
        return math.inf


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    got = "None" if value is None else f"{value!r:.100}" if isinstance(value, str) else value
    raise OptionError("value is not allowed", where=name, expected=expected, got=got)
