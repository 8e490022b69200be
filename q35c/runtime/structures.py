"""What an answer must look like, as callers say it: `response_format`, and a choice of tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from q35c import arguments
from q35c.errors import OptionError
from q35c.runtime.grammar import Kind

FORMATS = ("text", "json_object", "json_schema", "regex", "choice", "grammar")
CHOICES = ("auto", "none", "required")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A structure for `Grammars.compile`; `where` is the argument that it came from."""

    kind: Kind
    value: Any
    where: str


def read_format(response_format: Any) -> Wanted | None:
    """Return the structure of a response format, None for text. Raises OptionError.

    {"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": ...}}, or
    {"type": KIND, KIND: ...} with regex, choice (of texts) or grammar (Lark).
    """
    if response_format is None:
        return None
    name = "response_format"
    if not isinstance(response_format, Mapping):
        expected = '{"type": "json_schema", "json_schema": {"schema": ...}}, or another type'
        raise OptionError("not a format", where=name, expected=expected, got=response_format)
    fields = cast(Mapping[str, Any], response_format)
    kind = arguments.choice(f"{name}.type", fields.get("type"), FORMATS, "type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Wanted("object", None, name)
    if fields.get(kind) is None:
        raise OptionError("is missing", where=f"{name}.{kind}", got=fields)
    value = fields[kind]
    if kind != "json_schema":
        return Wanted(cast(Kind, kind), value, f"{name}.{kind}")
    schema = cast(Mapping[str, Any], value).get("schema") if isinstance(value, Mapping) else None
    if schema is None:
        raise OptionError("is missing", where=f"{name}.json_schema.schema")
    return Wanted("schema", schema, f"{name}.json_schema.schema")


def read_tool_choice(tool_choice: Any, schemas: Mapping[str, Any]) -> tuple[bool, Wanted | None]:
    """Return whether tools are offered, and the structure of a call that is forced. Raises OptionError.

    `tool_choice` is auto, none, required, or the name of a tool; `schemas` are those of the tools' arguments.
    """
    names: Sequence[str] = list(schemas)
    choice = arguments.choice("tool_choice", tool_choice, [*CHOICES, *names], "choice of tools")
    if choice in ("auto", "none") and choice not in names:
        return choice == "auto", None
    if not names:
        raise OptionError("there are no tools to choose from", where="tool_choice", got=choice)
    forced = [choice] if choice in names else names
    return True, Wanted("calls", tuple((name, schemas[name]) for name in forced), "tool_choice")
