"""From the input of OpenAI's responses to a conversation: items become messages, tools become functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from q35c.errors import OptionError, RequestError
from q35c.runtime.attachments import Attachment
from q35c.serve.fields import Fields
from q35c.serve.options import MOST_MESSAGES, MOST_PARTS, MOST_TOOLS, check_tool_name, make_tool

_TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
_ROLES = ("user", "assistant", "system", "developer")
# What hosted tools left behind: the model has none of them, and their results stand in messages as well.
_SKIPPED = ("web_search_call", "file_search_call", "local_shell_call", "compaction")


def read_input(fields: Fields) -> list[dict[str, Any]]:
    """Return the messages of `instructions` and `input`. Raises OptionError, RequestError."""
    messages: list[dict[str, Any]] = []
    if instructions := fields.text("instructions"):
        messages.append({"role": "system", "content": instructions})
    value = fields.require("input", fields.value("input"))
    if isinstance(value, str):
        return [*messages, {"role": "user", "content": value}]
    collector = _Collector(messages)
    for item in fields.objects("input", MOST_MESSAGES) or ():
        collector.add(item)
    if not messages:
        raise OptionError("the conversation is empty", where="input", expected="1 item")
    return messages


class _Collector:
    """Put items together: an assistant's reasoning, text and calls are one message."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._messages = messages

    def add(self, item: Fields) -> None:
        kind = item.text("type", 100) or "message"
        if kind == "message":
            self._add_message(item)
        elif kind == "reasoning":
            text = _text_of(item, "content") or _text_of(item, "summary")
            if text:
                message = self._assistant(is_new=True)
                message["reasoning_content"] = text
        elif kind in ("function_call", "custom_tool_call"):
            self._add_call(item, kind)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            call = item.require("call_id", item.text("call_id", 256))
            content = _content_of(item, "output")
            self._messages.append({"role": "tool", "tool_call_id": call, "content": content})
        elif kind not in _SKIPPED:
            raise RequestError("items of this type are not read", where=item.path("type"))

    def _add_message(self, item: Fields) -> None:
        role = item.require("role", item.choice("role", _ROLES))
        content = _content_of(item, "content")
        if role == "assistant":
            last = self._messages[-1] if self._messages else {}
            is_open = last.get("role") == "assistant" and last["content"] == ""
            self._assistant(is_new=not is_open or "tool_calls" in last)["content"] = content
        else:
            self._messages.append({"role": role, "content": content})

    def _add_call(self, item: Fields, kind: str) -> None:
        call = item.require("call_id", item.text("call_id", 256))
        name = check_tool_name(item.value("name"), item.path("name"))
        arguments: Any
        if kind == "function_call":
            arguments = item.require("arguments", item.text("arguments"))
        else:
            arguments = {"input": item.text("input") or ""}
        function = {"name": name, "arguments": arguments}
        message = self._assistant(is_new=False)
        message.setdefault("tool_calls", []).append(
            {"id": call, "type": "function", "function": function}
        )

    def _assistant(self, is_new: bool) -> dict[str, Any]:
        """Return the assistant's message that is being put together, or a new one."""
        last = self._messages[-1] if self._messages else None
        if is_new or last is None or last["role"] != "assistant":
            last = {"role": "assistant", "content": ""}
            self._messages.append(last)
        return last


def _text_of(item: Fields, name: str) -> str:
    """Return the text of a field that holds one or a list of parts. Raises OptionError, RequestError."""
    content = _content_of(item, name)
    return content if isinstance(content, str) else ""


def _content_of(item: Fields, name: str) -> str | list[dict[str, Any]]:
    """Return the text of a field, or its texts and pictures as parts. Raises OptionError, RequestError."""
    value = item.value(name)
    if value is None or isinstance(value, str):
        return value or ""
    said = [_said(part) for part in item.objects(name, MOST_PARTS) or ()]
    if all(isinstance(one, str) for one in said):
        return "".join(map(str, said))
    return [{"type": "text", "text": one} if isinstance(one, str) else one for one in said]


def _said(part: Fields) -> str | dict[str, Any]:
    """Return the text of a part, or a picture as a part."""
    kind = part.require("type", part.text("type", 100))
    where = part.path("type").removesuffix(".type")
    if kind == "input_image":
        shown = part.text("image_url")
        if shown is None:  # files that a service would have stored
            raise RequestError("the picture is missing", where=where, expected="image_url")
        return {"type": "image", "image": Attachment(shown, False, where)}
    if kind not in _TEXTS:
        raise RequestError(
            "parts of this type are not read",
            where=where,
            expected="text or input_image",
            hint="describe it in words, or leave it out",
        )
    return part.text("refusal" if kind == "refusal" else "text") or ""


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions of a request in OpenAI's form; some were members of a namespace, which their calls name."""

    functions: tuple[dict[str, Any], ...] = ()
    namespaces: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool["function"]["name"] for tool in self.functions)


def read_tools(fields: Fields) -> Tools:
    """Return the functions of a request. Hosted tools are left out: the model has none of them."""
    made: dict[str, dict[str, Any]] = {}
    namespaces: dict[str, str] = {}
    for tool, namespace in _functions(fields):
        name = check_tool_name(tool.value("name"), tool.path("name"))
        if name in made:
            continue  # the same name in two namespaces: the first is the one that is called
        where = tool.path("parameters")
        made[name] = make_tool(name, tool.text("description"), tool.value("parameters"), where)
        if namespace:
            namespaces[name] = namespace
    if len(made) > MOST_TOOLS:
        raise OptionError("too many tools", where="tools", expected=f"at most {MOST_TOOLS}")
    return Tools(tuple(made.values()), namespaces)


def _functions(fields: Fields) -> Iterator[tuple[Fields, str]]:
    for tool in fields.objects("tools", MOST_TOOLS) or ():
        kind = tool.require("type", tool.text("type", 100))
        if kind == "function":
            yield tool, ""
        elif kind == "namespace":
            namespace = check_tool_name(tool.value("name"), tool.path("name"))
            for member in tool.objects("tools", MOST_TOOLS) or ():
                if member.value("type") in (None, "function"):
                    yield member, namespace


def read_tool_choice(fields: Fields) -> Any:
    """Return what `options.read_choice_of_tools` takes. Raises OptionError."""
    value = fields.value("tool_choice")
    if not isinstance(value, dict):
        return value
    named = fields.nested("tool_choice")
    assert named is not None
    kind = named.text("type", 100)
    if kind == "function":
        return check_tool_name(named.value("name"), named.path("name"))
    if kind == "allowed_tools":
        return named.choice("mode", ("auto", "required")) or "auto"
    return "auto"  # a hosted tool, which the model does not have
