"""Turn conversations into plain data, which is all that a template gets to see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import FunctionType, MethodType
from typing import Any, cast

from q35c import strictjson
from q35c.errors import OptionError
from q35c.runtime.attachments import Attachment, is_place, media_kind
from q35c.runtime.chat.budget import MAX_BITS, Budget, Items, Table
from q35c.runtime.chat.tools import function_schema

Message = Mapping[str, Any]
MAX_NESTING = 64
MAX_ARGUMENT_BYTES = 16 << 20
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names in use; templates read the first


class PlainData:
    """Copy values as plain texts, numbers, lists and mappings, and count what they weigh."""

    def __init__(self, change_text: Callable[[str], str] | None = None) -> None:
        """`change_text` is applied to every text, keys included."""
        self._change_text = change_text
        self._meter = Budget(1 << 40)  # the caller's own data has no limit but memory
        self.weight = 0

    def copy(self, value: Any, where: str) -> Any:
        """Return plain data. Raises OptionError that names the place of any other value."""
        made = self._copy(value, where, 0)
        self.weight += self._meter.weigh(made)
        return made

    def items(self, values: list[Any]) -> Items:
        """Return a list of copied values."""
        return self._meter.items(values)

    def table(self, values: dict[Any, Any]) -> Table:
        """Return a mapping of copied values."""
        return self._meter.table(values)

    def _copy(self, value: Any, where: str, depth: int) -> Any:
        if depth > MAX_NESTING:
            raise OptionError(
                "values are nested too deeply", where=where[:200], expected=MAX_NESTING
            )
        if isinstance(value, Enum) and not isinstance(value, (str, int, float)):
            value = value.value
        if value is None or isinstance(value, (str, int, float)):
            return self._scalar(value, where)
        if isinstance(value, Mapping):
            return self._table(cast(Mapping[Any, Any], value), where, depth)
        if isinstance(value, (list, tuple)):
            items = cast(Sequence[Any], value)
            copied = [self._copy(x, f"{where}[{i}]", depth + 1) for i, x in enumerate(items)]
            if isinstance(value, tuple):
                return self._meter.group(tuple(copied))
            return self._meter.items(copied)
        return self._copy(_unwrapped(value, where), where, depth + 1)

    def _scalar(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            text = str.__str__(value)
            return text if self._change_text is None else self._change_text(text)
        if isinstance(value, float):
            return float.__float__(value)
        if value.bit_length() > MAX_BITS:
            raise OptionError("an integer is too large", where=where, expected=f"{MAX_BITS} bits")
        return int.__int__(value)

    def _table(self, value: Mapping[Any, Any], where: str, depth: int) -> Table:
        made: dict[Any, Any] = {}
        for key, item in value.items():
            if key is not None and not isinstance(key, (str, int, float)):
                raise OptionError(
                    "a key is no text", where=where, expected="text", got=type(key).__name__
                )
            key = self._scalar(key, where)
            made[key] = self._copy(item, f"{where}.{str(key)[:80]}", depth + 1)
        return self._meter.table(made)


def _unwrapped(value: Any, where: str) -> Any:
    """Return what an object of another library stands for. Raises OptionError for unknown objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    kind = cast(Any, type(value))
    for method in ("model_dump", "tolist"):  # pydantic; numbers and arrays of numpy
        convert = getattr(kind, method, None)
        if callable(convert):
            return convert(value)
    raise OptionError(
        "a value is no plain data",
        where=where[:200],
        expected="texts, numbers, lists and mappings",
        got=type(value).__name__,
    )


def check_messages(messages: Any) -> list[Any]:
    """Return the messages as a list. Raises OptionError if they are no conversation."""
    messages = getattr(messages, "messages", messages)
    if not isinstance(messages, (list, tuple)):
        raise OptionError(
            "not a conversation",
            where="messages",
            expected="a list of mappings with role and content",
            got=type(messages).__name__,
        )
    made = list(cast(Sequence[Any], messages))
    if not made:
        raise OptionError("the conversation is empty", where="messages", expected="1 message")
    return made


def copy_messages(data: PlainData, messages: Any) -> Items:
    """Return the messages as plain data. Raises OptionError that names the place of what is wrong."""
    made: list[Any] = []
    for index, message in enumerate(check_messages(messages)):
        where = f"messages[{index}]"
        copied = data.copy(message, where)
        if not isinstance(copied, dict):
            raise OptionError(
                "not a message",
                where=where,
                expected="a mapping with role and content",
                got=type(message).__name__,
            )
        made.append(_with_reasoning(data, copied))
    return data.items(made)


def _with_reasoning(data: PlainData, message: Any) -> Any:
    """Give a message's reasoning under all names that templates read."""
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if found is None:
        return message
    return data.table({"thinking": found, **message, "reasoning_content": found})


def copy_tools(data: PlainData, tools: Any) -> Any:
    """Return tools as plain data; functions become their schemas. Raises OptionError."""
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise OptionError(
            "not a list of tools",
            where="tools",
            expected="a list of schemas or functions",
            got=type(tools).__name__,
        )
    made: list[Any] = []
    for index, tool in enumerate(cast(Sequence[Any], tools)):
        where = f"tools[{index}]"
        if isinstance(tool, (FunctionType, MethodType)):
            tool = function_schema(tool, where)
        copied = data.copy(tool, where)
        if not isinstance(copied, dict):
            raise OptionError(
                "not a tool",
                where=where,
                expected="a schema (mapping) or a function with hints and a docstring",
                got=type(tool).__name__,
            )
        made.append(copied)
    return data.items(made)


def parse_arguments(messages: Any) -> list[Any]:
    """Return messages whose tool arguments are mappings, also where they came as JSON text.

    Raises OptionError for a text that is no JSON object.
    """
    made: list[Any] = []
    for index, message in enumerate(check_messages(messages)):
        calls = _field(message, "tool_calls")
        if isinstance(calls, (list, tuple)):
            where = f"messages[{index}].tool_calls"
            parsed = [_parse_call(x, f"{where}[{i}]") for i, x in enumerate(cast(Any, calls))]
            message = {**cast(Mapping[str, Any], message), "tool_calls": parsed}
        made.append(message)
    return made


def _parse_call(call: Any, where: str) -> Any:
    if not isinstance(call, Mapping):
        return call
    made = dict(cast(Mapping[str, Any], call))
    if isinstance(made.get("function"), Mapping):
        made["function"] = _parse_call(made["function"], where + ".function")
    text = made.get("arguments")
    if isinstance(text, str):
        made["arguments"] = _parse_object(text, where + ".arguments") if text.strip() else {}
    return made


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        document = strictjson.loads(
            text.encode("utf-8", "replace"),
            where=where,
            limit=MAX_ARGUMENT_BYTES,
            error=OptionError,
        )
    except OptionError as error:
        raise OptionError(
            f"the arguments of a tool call are no JSON: {error.what}",
            where=where,
            expected="a mapping, or a text that holds a JSON object",
            got=repr(text[:80]),
        ) from None
    if not isinstance(document, dict):
        raise OptionError(
            "the arguments of a tool call are no JSON object",
            where=where,
            expected="a mapping, or a text that holds a JSON object",
            got=repr(text[:80]),
        )
    return cast(dict[str, Any], document)


def refuse_media(messages: Any) -> None:
    """Raise OptionError for parts of messages that are neither text nor places: nothing can see or hear them."""
    for index, message in enumerate(check_messages(messages)):
        content = _field(message, "content")
        if not isinstance(content, (list, tuple)):
            continue
        for place, part in enumerate(cast(Sequence[Any], content)):
            kind = None if is_place(part) else media_kind(part)
            if kind is not None:
                shown = next((v for v in part.values() if isinstance(v, Attachment)), None)
                raise OptionError(
                    f"a part of a message is {kind}, which this model cannot take in",
                    where=shown.where if shown else f"messages[{index}].content[{place}]",
                    expected='{"type": "text", "text": ...}',
                    hint="describe it in words, or leave it out",
                )


def _field(message: Any, name: str) -> Any:
    return cast(Mapping[str, Any], message).get(name) if isinstance(message, Mapping) else None


# A space behind it shows whether the template trims what precedes it.
_OPEN_END = "Q35C_THE_MESSAGE_ENDS_HERE "


def leave_open(data: PlainData, messages: Items, field: str) -> Items:
    """Return copied messages with a mark at the end of the last one. Raises OptionError."""
    last = dict(cast(dict[str, Any], messages[-1]))
    value = last.get(field)
    if isinstance(value, str):
        for name in REASONING if field in REASONING else (field,):
            if last.get(name) == value:
                last[name] = value + _OPEN_END
    elif isinstance(value, list):
        last[field] = _open_last_part(data, cast(list[Any], value))
    else:
        raise OptionError(
            "the last message has no text to continue",
            where=f"messages[{len(messages) - 1}].{field}",
            expected="text",
            got=type(value).__name__,
        )
    return data.items([*messages[:-1], data.table(last)])


def _open_last_part(data: PlainData, parts: list[Any]) -> Items:
    for place in reversed(range(len(parts))):
        text = _field(parts[place], "text")
        if isinstance(text, str):
            marked = data.table({**parts[place], "text": text + _OPEN_END})
            return data.items([*parts[:place], marked, *parts[place + 1 :]])
    raise OptionError("the last message has no text to continue", where="messages")


def cut_open_end(text: str) -> str:
    """Return the text up to the mark. Raises OptionError if the template left the message out."""
    at = text.rfind(_OPEN_END.strip())
    if at < 0:
        raise OptionError(
            "the template leaves out the message that is to be continued", where="messages"
        )
    return text[:at] if text.startswith(_OPEN_END, at) else text[:at].rstrip()
