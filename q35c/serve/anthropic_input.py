"""From the messages of Anthropic's clients to a conversation in OpenAI's form."""

from __future__ import annotations

from typing import Any

from q35c.errors import OptionError, RequestError
from q35c.runtime.attachments import Attachment
from q35c.serve.fields import Fields
from q35c.serve.options import MOST_MESSAGES, MOST_PARTS, MOST_TOOLS, check_tool_name, make_tool

_ROLES = ("user", "assistant", "system")


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Return the messages of `system` and `messages`. Raises OptionError, RequestError."""
    made: list[dict[str, Any]] = []
    if system := _system(fields):
        made.append({"role": "system", "content": system})
    listed = fields.require("messages", fields.objects("messages", MOST_MESSAGES))
    if not listed:
        raise OptionError("the conversation is empty", where="messages", expected="1 message")
    for message in listed:
        role = message.require("role", message.choice("role", _ROLES))
        if isinstance(content := message.value("content"), str):
            made.append({"role": role, "content": content})
            continue
        blocks = message.require("content", message.objects("content", MOST_PARTS))
        made += _assistant(blocks) if role == "assistant" else _others(role, blocks)
    return made


def _system(fields: Fields) -> Any:
    """Return the content of the system's message, a text or parts."""
    value = fields.value("system")
    if value is None or isinstance(value, str):
        return value
    blocks = fields.objects("system", MOST_PARTS) or []
    return [{"type": "text", "text": _text(block)} for block in blocks]


def _assistant(blocks: list[Fields]) -> list[dict[str, Any]]:
    """Return an assistant's message: its thinking, text and calls."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for block in blocks:
        kind = block.require("type", block.text("type", 100))
        if kind == "thinking":
            thinking = block.text("thinking") or ""
            message["reasoning_content"] = message.get("reasoning_content", "") + thinking
        elif kind == "tool_use":
            name = check_tool_name(block.value("name"), block.path("name"))
            given = block.nested("input")
            function = {"name": name, "arguments": dict(given.document) if given else {}}
            call = {"id": block.text("id", 256), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif kind != "redacted_thinking":
            message["content"] += _text(block)
    return [message]


def _others(role: str, blocks: list[Fields]) -> list[dict[str, Any]]:
    """Return a user's message: each result of a tool is a message of its own, and so is what stands between them."""
    made: list[dict[str, Any]] = []
    for block in blocks:
        if block.value("type") == "tool_result":
            call = block.require("tool_use_id", block.text("tool_use_id", 256))
            block.flag("is_error")
            made.append({"role": "tool", "tool_call_id": call, "content": _result(block)})
        elif made and made[-1]["role"] == role:
            made[-1]["content"].append(_said(block))
        else:
            made.append({"role": role, "content": [_said(block)]})
    if not made:
        raise OptionError("the message is empty", where="messages", expected="text")
    return [
        {**one, "content": _joined(one["content"], "\n\n")} if one["role"] == role else one
        for one in made
    ]


def _result(block: Fields) -> Any:
    """Return the content of a tool's result, a text or parts."""
    value = block.value("content")
    if value is None or isinstance(value, str):
        return value or ""
    return _joined([_said(part) for part in block.objects("content", MOST_PARTS) or ()], "\n")


def _joined(said: list[Any], between: str) -> Any:
    """Return texts as one, or texts and pictures as parts."""
    if all(isinstance(one, str) for one in said):
        return between.join(said)
    return [{"type": "text", "text": one} if isinstance(one, str) else one for one in said]


def _said(block: Fields) -> Any:
    """Return the text of a block, or its picture as a part."""
    if block.value("type") != "image":
        return _text(block)
    source = block.require("source", block.nested("source"))
    kind = source.require("type", source.choice("type", ("base64", "url")))
    if kind == "url":
        shown = source.require("url", source.text("url"))
    else:
        media = source.require("media_type", source.text("media_type", 100))
        shown = f"data:{media};base64,{source.require('data', source.text('data'))}"
    where = block.path("type").removesuffix(".type")
    return {"type": "image", "image": Attachment(shown, False, where)}


def _text(block: Fields) -> str:
    """Return the text of a block. Raises RequestError for what is none."""
    if block.require("type", block.text("type", 100)) != "text":
        raise RequestError(
            "blocks of this type are not read",
            where=block.path("type").removesuffix(".type"),
            expected="text or image",
            hint="describe it in words, or leave it out",
        )
    return block.require("text", block.text("text"))


def read_tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    """Return the functions of a request. Tools that Anthropic runs are left out: there are none here."""
    made: list[dict[str, Any]] = []
    for tool in fields.objects("tools", MOST_TOOLS) or ():
        if tool.text("type", 100) not in (None, "custom"):
            continue
        name = check_tool_name(tool.value("name"), tool.path("name"))
        description = tool.text("description")
        schema, where = tool.value("input_schema"), tool.path("input_schema")
        made.append(make_tool(name, description, schema, where))
    return tuple(made)


def read_tool_choice(fields: Fields) -> tuple[Any, bool]:
    """Return what `options.read_choice_of_tools` takes, and whether more than one call is allowed."""
    choice = fields.nested("tool_choice")
    if choice is None:
        return None, True
    is_parallel = choice.flag("disable_parallel_tool_use") is not True
    kind = choice.require("type", choice.choice("type", ("auto", "any", "tool", "none")))
    if kind == "tool":
        return check_tool_name(choice.value("name"), choice.path("name")), is_parallel
    return kind, is_parallel
