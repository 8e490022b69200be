"""Python functions as tools: their JSON schema, from type hints and a docstring in Google's style.

The schema is the one that transformers makes, as models were trained on it. Source:
https://huggingface.co/docs/transformers/chat_extras
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from q35c.errors import OptionError

_SCALARS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
}
_SIMPLE: dict[Any, dict[str, Any]] = {
    **{kind: {"type": name} for kind, name in _SCALARS.items()},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SECTION = re.compile(r"^[ \t]*(Args|Returns|Raises):[ \t]*$", re.MULTILINE)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)
Schema = dict[str, Any]


def function_schema(function: Callable[..., Any], where: str) -> Schema:
    """Return the schema of a function. Raises OptionError if hints or descriptions are missing."""
    name = getattr(function, "__name__", "operation")
    where = f"{where} ({name})"
    document = inspect.getdoc(function)
    if not document:
        raise OptionError("a function has no docstring", where=where, hint=_HINT)
    description, arguments, returned = _read_docstring(document.strip())
    parameters, result = _parameters(function, where)
    for argument, schema in parameters["properties"].items():
        if argument not in arguments:
            raise OptionError(
                f"the docstring does not describe {argument!r}", where=where, hint=_HINT
            )
        schema |= _described(arguments[argument], where)
    schema = {"name": name, "description": description, "parameters": parameters}
    if result is not None:
        schema["return"] = result if returned is None else {**result, "description": returned}
    return {"type": "function", "function": schema}


_HINT = "give it hints, and a docstring with a section `Args:`; or pass a JSON schema"


def _parameters(function: Callable[..., Any], where: str) -> tuple[Schema, Schema | None]:
    """Return the schema of the parameters, and of the result where it has one."""
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError, SyntaxError) as error:
        raise OptionError(f"a hint cannot be read: {error}", where=where, hint=_HINT) from None
    signature = inspect.signature(function).parameters
    required: list[str] = []
    for index, (name, parameter) in enumerate(signature.items()):
        is_bare = parameter.annotation is inspect.Parameter.empty
        if is_bare and index == 0 and name in ("self", "cls"):
            continue
        if is_bare:
            raise OptionError(f"argument {name!r} has no hint", where=where, hint=_HINT)
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
    result = _hint_schema(hints.pop("return"), where, strict=False) if "return" in hints else None
    schema: Schema = {
        "type": "object",
        "properties": {name: _hint_schema(hint, where) for name, hint in hints.items()},
    }
    return (schema | {"required": required} if required else schema), result


def _hint_schema(hint: Any, where: str, strict: bool = True) -> Any:
    """Return the schema of a type; None for a type without one if that is no fault."""
    try:
        return _schema(hint)
    except ValueError as error:
        if not strict:
            return None
        raise OptionError(str(error), where=where, hint=_HINT) from None


def _schema(hint: Any) -> Schema:
    origin = get_origin(hint)
    args: tuple[Any, ...] = get_args(hint)
    if origin is None and isinstance(hint, type) and issubclass(hint, Enum):
        return _choice([member.value for member in hint])
    if origin is None and hint in _SIMPLE:
        return dict(_SIMPLE[hint])
    if origin is Literal:
        return _choice(list(args))
    if origin in (Union, types.UnionType):
        return _union(args)
    if origin is list:
        return {"type": "array", "items": _schema(args[0])}
    if origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_schema(part) for part in args]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema([*args][-1])}
    raise ValueError(f"the hint {hint!r} has no JSON schema"[:200])


def _choice(values: list[Any]) -> Schema:
    kinds = [_SCALARS.get(type(value)) for value in values]
    if not kinds or None in kinds:
        raise ValueError(f"the choices {values!r} are no JSON scalars"[:200])
    names = list(dict.fromkeys(kinds))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _union(args: tuple[Any, ...]) -> Schema:
    parts = [_schema(part) for part in args if part is not type(None)]
    if len(parts) == 1:
        made = parts[0]
    elif all(part.keys() == {"type"} and isinstance(part["type"], str) for part in parts):
        names = sorted({part["type"] for part in parts})
        made = {"type": names[0] if len(names) == 1 else names}
    else:
        made = {"anyOf": parts}
    return made | {"nullable": True} if type(None) in args else made


def _described(text: str, where: str) -> Schema:
    """Return an argument's description, and its choices where it ends with some."""
    found = _CHOICES.search(text)
    if found is None:
        return {"description": text}
    try:
        choices = json.loads(found[1])
    except ValueError:
        raise OptionError("the choices are no JSON list", where=where, got=found[1][:80]) from None
    values = [choice.strip() if isinstance(choice, str) else choice for choice in choices]
    return {"enum": values, "description": text[: found.start()].strip()}


def _read_docstring(document: str) -> tuple[str, dict[str, str], str | None]:
    """Return the description, those of the arguments, and that of the result."""
    cuts = [(found.start(), found.end(), found[1]) for found in _SECTION.finditer(document)]
    ends = [*(start for start, _, _ in cuts), len(document)][1:]
    sections: dict[str, str] = {}
    for (_, begin, name), end in zip(cuts, ends, strict=True):
        sections.setdefault(name, document[begin:end])
    description = document[: cuts[0][0]] if cuts else document
    returned = sections.get("Returns", "").strip()
    return description.strip(), _read_arguments(sections.get("Args", "")), returned or None


def _read_arguments(section: str) -> dict[str, str]:
    """Return the description of each argument: `name: text`, more of it on deeper lines."""
    made: dict[str, list[str]] = {}
    margin, current = 0, None
    for line in filter(str.strip, section.splitlines()):
        indent = len(line) - len(line.lstrip())
        found = re.match(r"\s*(\w+):\s*(.*)", line)
        if found and (current is None or indent <= margin):
            margin, current = indent, found[1]
            made[current] = [found[2].strip()] if found[2].strip() else []
        elif current is not None:
            made[current].append(line.strip())
    return {name: " ".join(lines) for name, lines in made.items()}
