"""Bring conversations, as clients send them, into the form that the family's templates take.

The templates refuse some of what clients send as a matter of course: arguments of calls as JSON text, developers,
a second system message. They also read reasoning under one name only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from q35c import arguments
from q35c.errors import OptionError
from q35c.runtime.attachments import is_place
from q35c.runtime.chat.messages import (
    REASONING,
    PlainData,
    check_messages,
    parse_arguments,
    refuse_media,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
# A client's bookkeeping, which may change with each request: no cache could find such a prompt again.
BILLING = "x-anthropic-billing-header:"
_BLANK_LINE = "\n\n"
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_REASONING_PARTS = ("thinking", "reasoning")
_DROPPED_PARTS = ("redacted_thinking",)


def normalise(messages: Any) -> list[dict[str, Any]]:
    """Return messages with a role, content that is text, and calls whose arguments are mappings.

    Content in which pictures and clips have places (`attachments`) is texts and places. Developers are the system. What the system says first is one message, joined by blank lines; what it says later is a
    user's message in its place. Reasoning is `reasoning_content` whatever it was named, a part of the content included.

    Raises OptionError that names the message and the field: for no conversation, unknown roles, content that is no
    text, and arguments that are no JSON object.
    """
    data = PlainData()
    copied = [
        data.copy(message, f"messages[{index}]")
        for index, message in enumerate(check_messages(messages))
    ]
    refuse_media(copied)
    begun: list[str] = []
    made: list[dict[str, Any]] = []
    for index, message in enumerate(parse_arguments(copied)):
        one = _normalised(message, f"messages[{index}]")
        if one["role"] != "system":
            made.append(one)
        elif one["content"]:
            if made:
                made.append({**one, "role": "user"})
            else:
                begun.append(one["content"])
    if begun:
        made.insert(0, {"role": "system", "content": _BLANK_LINE.join(begun)})
    return made


def _normalised(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise OptionError(
            "not a message", where=where, expected="a mapping with role and content", got=message
        )
    fields = dict(cast(Mapping[str, Any], message))
    role = arguments.choice(f"{where}.role", fields.get("role"), ROLES, "role")
    made: dict[str, Any] = {"role": "system" if role == "developer" else role}
    said, thoughts = _split_content(fields.pop("content", None), f"{where}.content")
    texts = [text for text in said if isinstance(text, str)]
    if made["role"] == "system":
        if len(texts) < len(said):
            raise OptionError(
                "a system shows no pictures", where=where, hint="let a user show them"
            )
        texts = [text for text in texts if not text.startswith(BILLING)]
        return {**made, "content": _BLANK_LINE.join(filter(None, texts))}
    made["content"] = "".join(texts) if len(texts) == len(said) else _joined(said)
    thoughts += [
        _text(fields[name], f"{where}.{name}") for name in REASONING if fields.get(name) is not None
    ][:1]
    if role == "assistant" and thoughts:
        made["reasoning_content"] = _BLANK_LINE.join(thoughts)
    calls = fields.pop("tool_calls", None)
    if role == "assistant" and calls:
        made["tool_calls"] = _checked_calls(calls, f"{where}.tool_calls")
    return made | {k: v for k, v in fields.items() if k not in ("role", *REASONING)}


def _joined(said: list[str | dict[str, str]]) -> list[dict[str, str]]:
    """Return texts and places as parts, in order."""
    return [{"type": "text", "text": one} if isinstance(one, str) else one for one in said]


def _split_content(content: Any, where: str) -> tuple[list[str | dict[str, str]], list[str]]:
    """Return the texts of a message's content and the places of pictures among them, and the texts of its reasoning."""
    if content is None:
        return [], []
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, list):
        raise OptionError("not a content", where=where, expected="a text or parts", got=content)
    texts: list[str | dict[str, str]] = []
    thoughts: list[str] = []
    for place, part in enumerate(cast(list[Any], content)):
        at = f"{where}[{place}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if is_place(part):
            texts.append(dict(part))
            continue
        kind, text = _read_part(part, at)
        if kind not in _DROPPED_PARTS:
            (thoughts if kind in _REASONING_PARTS else texts).append(_text(text, f"{at}.{kind}"))
    return texts, thoughts


def _read_part(part: object, where: str) -> tuple[str, Any]:
    """Return a part's kind and its text."""
    fields = cast(Mapping[str, Any], part if isinstance(part, Mapping) else {})
    kind = fields.get("type", "text" if "text" in fields else None)
    if kind not in _TEXT_PARTS + _REASONING_PARTS + _DROPPED_PARTS:
        raise OptionError(
            "unknown part of a message",
            where=where,
            expected='{"type": "text", "text": ...}',
            got=cast(object, part) if kind is None else str(kind),
        )
    return kind, fields.get(kind, fields.get("text"))


def _checked_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise OptionError("not a list of calls", where=where, expected="a list", got=calls)
    return [
        _checked_call(call, f"{where}[{index}]")
        for index, call in enumerate(cast(list[Any], calls))
    ]


def _checked_call(call: object, where: str) -> dict[str, Any]:
    fields = dict(cast(Mapping[str, Any], call)) if isinstance(call, Mapping) else {}
    function = fields.get("function", fields)
    function = dict(cast(Mapping[str, Any], function)) if isinstance(function, Mapping) else {}
    name, given = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise OptionError(
            "a call names no function",
            where=where,
            expected='{"function": {"name": ..., "arguments": ...}}',
            got=cast(object, call),
        )
    if given is not None and not isinstance(given, Mapping):
        raise OptionError(
            "the arguments of a tool call are no JSON object",
            where=f"{where}.function.arguments",
            expected="a mapping, or a text that holds a JSON object",
            got=given,
        )
    known = {name: value for name, value in fields.items() if name in ("id", "type")}
    return {**known, "function": {**function, "arguments": given or {}}}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise OptionError("not a text", where=where, expected="a text", got=value)
    return value
