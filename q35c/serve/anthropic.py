"""Anthropic's messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.responses import Response

from q35c.runtime.chat.answer import (
    CallArguments,
    CallEnd,
    CallStart,
    ContentDelta,
    Part,
    ReasoningDelta,
)
from q35c.serve import sse
from q35c.serve.answer import Choice
from q35c.serve.anthropic_input import read_messages, read_tool_choice, read_tools
from q35c.serve.conversation import Ask, Sampling
from q35c.serve.desk import Desk, new_id
from q35c.serve.errors import Dialect, Failure, error_body
from q35c.serve.fields import Fields
from q35c.serve.incoming import Incoming
from q35c.serve.json_response import json_response
from q35c.serve.options import (
    MOST_TOKENS,
    read_caller,
    read_choice_of_tools,
    read_response_format,
    read_sampling_options,
    read_seed,
    read_stop,
    read_template,
)
from q35c.serve.request import Structure, Usage

SIGNATURE = "q35c"  # clients send it back untouched; nobody checks it
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "cancelled": "pause_turn"}


async def answer_messages(desk: Desk, incoming: Incoming) -> Response:
    """Answer a conversation."""
    fields = await incoming.fields()
    name = desk.check_model(fields)
    limit = fields.require("max_tokens", fields.integer("max_tokens", 1, MOST_TOKENS))
    ask = read_ask(fields, desk.model.vocab_size, incoming.key, limit)
    is_stream = fields.flag("stream") is True
    desk.metrics.count_unknown_fields(fields.count_unread())
    writer = MessageWriter(name)
    return desk.reply_to(incoming, ask, await desk.prepare(ask), writer, is_stream)


async def answer_count(desk: Desk, incoming: Incoming) -> Response:
    """Answer with the number of a prompt's tokens."""
    fields = await incoming.fields()
    desk.check_model(fields)
    ask = read_ask(fields, desk.model.vocab_size, incoming.key, None)
    ids = await desk.encode(ask)
    return json_response({"input_tokens": len(ids)})


def read_ask(fields: Fields, vocab: int, key: int, limit: int | None) -> Ask:
    """Return the conversation of a request. Raises OptionError, RequestError."""
    tools = read_tools(fields)
    choice, is_parallel = read_tool_choice(fields)
    names = tuple(tool["function"]["name"] for tool in tools)
    is_offered, forced = read_choice_of_tools(choice, names, "tool_choice")
    messages = read_messages(fields)
    metadata, thinking = fields.nested("metadata"), fields.nested("thinking")
    return Ask(
        messages=messages,
        sampling=Sampling(
            max_tokens=limit,
            seed=read_seed(fields),
            stop=read_stop(fields, "stop_sequences"),
            options=read_sampling_options(fields, vocab),
        ),
        tools=tools if is_offered else (),
        forced=forced,
        is_parallel=is_parallel,
        structure=_read_structure(fields),
        thinking_tokens=thinking.integer("budget_tokens", 1, MOST_TOKENS) if thinking else None,
        template=_read_thinking(fields, thinking),
        is_continued=_is_beginning(messages[-1]),
        caller=read_caller(fields, key, metadata.text("user_id", 1024) if metadata else None),
    )


def _read_structure(fields: Fields) -> Structure | None:
    config = fields.nested("output_config")
    return read_response_format(config.nested("format"), "output_config.format") if config else None


def _read_thinking(fields: Fields, thinking: Fields | None) -> dict[str, Any]:
    """Return variables for the template. Anthropic's models think only where they are asked to."""
    kind = thinking.choice("type", ("enabled", "adaptive", "disabled")) if thinking else None
    return {
        "enable_thinking": kind in ("enabled", "adaptive"),
        **read_template(fields, None),
    }


def _is_beginning(message: dict[str, Any]) -> bool:
    """Say whether the last message is the beginning of the answer."""
    is_text = message["role"] == "assistant" and "tool_calls" not in message
    return is_text and bool(message["content"])


class MessageWriter:
    """Write one answer as a `message` or as the events that build it up."""

    ping = sse.named("ping", {"type": "ping"})

    def __init__(self, model: str) -> None:
        self._id, self._model = new_id("msg_"), model
        self._block = ""  # the kind of the block that is open
        self._index = -1

    def open(self, index: int, choice: Choice) -> Iterable[bytes]:
        message = self._message([], None, choice.usage)
        yield _event("message_start", message=message)

    def write(self, index: int, choice: Choice, parts: list[Part]) -> Iterable[bytes]:
        for part in parts:
            yield from self._add(part)

    def close(self, index: int, choice: Choice) -> Iterable[bytes]:
        yield from self._leave()

    def end(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        choice = choices[0]
        delta = {"stop_reason": _reason(choice), "stop_sequence": choice.stop}
        yield _event("message_delta", delta=delta, usage=_usage(choice.usage))
        yield _event("message_stop")

    def fail(self, failure: Failure) -> Iterable[bytes]:
        yield sse.named("error", error_body(Dialect.ANTHROPIC, failure))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        choice = choices[0]
        blocks: list[dict[str, Any]] = []
        if choice.made.reasoning:
            blocks.append(
                {"type": "thinking", "thinking": choice.made.reasoning, "signature": SIGNATURE}
            )
        if choice.made.content:
            blocks.append({"type": "text", "text": choice.made.content})
        for call in choice.made.complete:
            blocks.append(_tool_use(call.id, call.name, json.loads(call.arguments)))
        return self._message(blocks, choice, choice.usage)

    def _add(self, part: Part) -> Iterable[bytes]:
        if isinstance(part, ReasoningDelta):
            if self._block != "thinking":
                yield from self._enter({"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": part.text})
        elif isinstance(part, ContentDelta):
            if self._block != "text":
                yield from self._enter({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": part.text})
        elif isinstance(part, CallStart):
            yield from self._enter(_tool_use(part.id, part.name, {}))
        elif isinstance(part, CallArguments):
            yield self._delta({"type": "input_json_delta", "partial_json": part.text})
        elif isinstance(part, CallEnd):
            yield from self._leave()

    def _enter(self, block: dict[str, Any]) -> Iterable[bytes]:
        yield from self._leave()
        self._block = block["type"]
        self._index += 1
        yield _event("content_block_start", index=self._index, content_block=block)

    def _leave(self) -> Iterable[bytes]:
        if self._block == "thinking":
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        if self._block:
            yield _event("content_block_stop", index=self._index)
        self._block = ""

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _message(
        self, blocks: list[dict[str, Any]], choice: Choice | None, usage: Usage
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            "stop_reason": None if choice is None else _reason(choice),
            "stop_sequence": None if choice is None else choice.stop,
            "usage": _usage(usage),
        }


def _event(kind: str, **fields: Any) -> bytes:
    return sse.named(kind, {"type": kind, **fields})


def _tool_use(identity: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": identity, "name": name, "input": arguments}


def _reason(choice: Choice) -> str:
    """Return why an answer ended, in Anthropic's words."""
    if choice.reason == "stop" or choice.reason is None:
        return "end_turn" if choice.stop is None else "stop_sequence"
    return _REASONS[choice.reason]


def _usage(usage: Usage) -> dict[str, Any]:
    """Return Anthropic's usage, whose input does not count what was cached."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.new_tokens,
    }
