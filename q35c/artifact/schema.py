"""Turn parsed JSON into frozen dataclasses, strictly, and back.

The dataclasses *are* the schema: every leaf is an `Annotated` type that carries its limits, so that the
reader, the writer and the mutation tests walk the same table. Nothing is converted silently, except
that an integer may stand where a real number is expected.
"""

import dataclasses
import functools
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from q35c.errors import ArtifactError, InputError

T = TypeVar("T")
_MOST_SHOWN = 400  # characters of a value in a message
_PLAIN = frozenset((int, str, float, bool, type(None)))


@dataclass(frozen=True)
class Range:
    """Limit a number to low..high, both included."""

    low: float
    high: float


@dataclass(frozen=True)
class Pattern:
    """Limit a string to a regular expression that must match all of it."""

    regex: str


@dataclass(frozen=True)
class Items:
    """Limit the number of items of a list or of keys of an object; keys must match `key`."""

    low: int
    high: int
    key: str = r"[ -~]{1,200}"


@dataclass(frozen=True)
class Reader:
    """Leave a value to another strict reader: a function of (value, path) that raises InputError."""

    read: Callable[[Any, str], object]


@dataclass(frozen=True)
class Tag:
    """Let a field of an object say which dataclass of a union it is: each has that field as a `Literal` of its own."""

    field: str


Limit = Range | Pattern | Items | Reader | Tag


def decode(kind: type[T], value: object, path: str) -> T:
    """Return `value` as an instance of the dataclass `kind`.

    `path` names the value in messages, as `$.io.bytes`. Raises ArtifactError at the first thing that is
    missing, unknown, of the wrong type or outside its limits.
    """
    return cast(T, _decode(kind, value, path))


def encode(value: object) -> Any:
    """Return dataclasses, tuples and mappings as plain JSON values."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if (names := _field_names(kind)) is not None:
        return {name: encode(getattr(value, name)) for name in names}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in cast(tuple[object, ...], value)]
    if isinstance(value, Mapping):
        items = cast(Mapping[str, object], value)
        return {key: encode(item) for key, item in items.items()}
    to_dict = getattr(value, "to_dict", None)
    return value if to_dict is None else to_dict()


@functools.cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    """Return the field names of a dataclass that is encoded field by field, None for any other type."""
    if not dataclasses.is_dataclass(kind) or hasattr(kind, "to_dict"):
        return None
    return tuple(field.name for field in dataclasses.fields(kind))


@functools.cache
def fields_of(kind: type) -> dict[str, Any]:
    """Return the field names of a dataclass with their types, limits included."""
    return get_type_hints(kind, include_extras=True)


def refuse(path: str, what: str, *, expected: object = None, got: object = None) -> ArtifactError:
    """Return the error for a manifest value; `path` is its place in the manifest."""
    where = f"manifest at {path}"
    return ArtifactError(what, where=where, expected=_limited(expected), got=_limited(got))


def _limited(value: object) -> object:
    """Return what a message shows of a value that may be large."""
    text = str(value)
    return value if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


def _decode(kind: Any, value: object, path: str) -> object:
    limit: Limit | None = None
    if get_origin(kind) is Annotated:
        kind, limit = get_args(kind)
    if isinstance(limit, Reader):
        return _decode_elsewhere(limit, value, path)
    origin = get_origin(kind)
    if isinstance(limit, Tag):
        kind = _tagged(kind, limit.field, value, path)
    if dataclasses.is_dataclass(kind):
        return _decode_record(cast(type, kind), value, path)
    if origin is tuple:
        return _decode_list(get_args(kind)[0], limit, value, path)
    if origin is Mapping:
        return _decode_map(get_args(kind)[1], limit, value, path)
    if origin is Literal:
        # `1 == True` in Python, so the type is compared too.
        choices = get_args(kind)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise refuse(path, "value is not allowed", expected=choices, got=_brief(value))
        return value
    if origin in (types.UnionType, Union):
        return _decode_union(get_args(kind), value, path)
    return _decode_scalar(kind, limit, value, path)


def _decode_elsewhere(reader: Reader, value: object, path: str) -> object:
    try:
        return reader.read(value, path)
    except InputError as error:
        raise refuse(
            error.where or path, error.what, expected=error.expected, got=error.got
        ) from None


def _tagged(kind: Any, field: str, value: object, path: str) -> type:
    """Return the dataclass that the value's tag names."""
    kinds = {get_args(fields_of(one)[field])[0]: one for one in get_args(kind) or (kind,)}
    tag = _expect_object(value, path).get(field)
    if not isinstance(tag, str) or tag not in kinds:
        where = f"{path}.{field}"
        raise refuse(where, "value is not allowed", expected=sorted(kinds), got=_brief(tag))
    return kinds[tag]


def _decode_record(kind: type, value: object, path: str) -> object:
    table = _expect_object(value, path)
    fields = fields_of(kind)
    for name in fields:
        if name not in table:
            raise refuse(f"{path}.{name}", "field is missing")
    for name in table:
        if name not in fields:
            raise refuse(f"{path}.{_brief(name)}", "field is unknown", expected=sorted(fields))
    return kind(**{name: _decode(fields[name], table[name], f"{path}.{name}") for name in fields})


def _decode_list(item: Any, limit: Limit | None, value: object, path: str) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise refuse(path, "a list is required", got=_brief(value))
    values = cast(list[object], value)
    _check_items(limit, len(values), path)
    return tuple(_decode(item, entry, f"{path}[{index}]") for index, entry in enumerate(values))


def _decode_map(item: Any, limit: Limit | None, value: object, path: str) -> dict[str, object]:
    table = _expect_object(value, path)
    _check_items(limit, len(table), path)
    key_regex = limit.key if isinstance(limit, Items) else Items(0, 0).key
    for key in table:
        if not re.fullmatch(key_regex, key):
            raise refuse(path, "key is not allowed", expected=key_regex, got=_brief(key))
    return {key: _decode(item, entry, f"{path}.{key}") for key, entry in table.items()}


def _decode_union(kinds: tuple[Any, ...], value: object, path: str) -> object:
    given = [kind for kind in kinds if kind is not type(None)]
    if value is not None and len(given) == 1 and dataclasses.is_dataclass(given[0]):
        return _decode(given[0], value, path)  # so that errors say what in it is wrong
    for kind in kinds:
        try:
            return _decode(kind, value, path)
        except ArtifactError:
            continue
    raise refuse(path, "value has a type or size that is not allowed", got=_brief(value))


def _decode_scalar(kind: type, limit: Limit | None, value: object, path: str) -> object:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # exact: a bool is not an int
        names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
        raise refuse(path, f"{names[kind]} is required", got=_brief(value))
    if isinstance(limit, Range) and not (
        isinstance(value, (int, float))
        and math.isfinite(value)
        and limit.low <= value <= limit.high
    ):
        raise refuse(path, "number is out of range", expected=limit, got=value)
    if isinstance(limit, Pattern) and not re.fullmatch(limit.regex, cast(str, value)):
        raise refuse(path, "string has a wrong form", expected=limit.regex, got=_brief(value))
    return value


def _expect_object(value: object, path: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise refuse(path, "an object is required", got=_brief(value))
    return cast(dict[str, object], value)


def _check_items(limit: Limit | None, count: int, path: str) -> None:
    if isinstance(limit, Items) and not limit.low <= count <= limit.high:
        raise refuse(
            path, "wrong number of items", expected=f"{limit.low} to {limit.high}", got=count
        )


def _brief(value: object) -> str:
    is_container = isinstance(value, (list, dict))
    text = type(cast(object, value)).__name__ if is_container else ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
