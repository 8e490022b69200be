"""OpenAI's responses, without memory: each request brings its whole conversation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from q35c.serve.conversation import Ask, Sampling
from q35c.serve.desk import Desk, new_id
from q35c.serve.errors import Failure
from q35c.serve.fields import Fields
from q35c.serve.incoming import Incoming
from q35c.serve.openai import EFFORTS
from q35c.serve.options import (
    MOST_TOKENS,
    read_caller,
    read_choice_of_tools,
    read_response_format,
    read_sampling_options,
    read_seed,
    read_template,
)
from q35c.serve.request import Usage
from q35c.serve.responses_input import read_input, read_tool_choice, read_tools

_STATELESS = "nothing is kept between requests"
_ECHOED = ("instructions", "metadata", "temperature", "top_p", "max_output_tokens", "user")


async def answer_responses(desk: Desk, incoming: Incoming) -> Response:
    """Answer a conversation."""
    fields = await incoming.fields()
    name = desk.check_model(fields)
    ask, namespaces = read_response(fields, desk.model.vocab_size, incoming.key)
    is_stream = fields.flag("stream") is True
    desk.metrics.count_unknown_fields(fields.count_unread())
    writer = ResponseWriter(_head(fields, name, ask), namespaces)
    return desk.reply_to(incoming, ask, await desk.prepare(ask), writer, is_stream)


def read_response(fields: Fields, vocab: int, key: int) -> tuple[Ask, dict[str, str]]:
    """Return the conversation of a request, and the namespaces of its tools. Raises OptionError, RequestError."""
    for name in ("previous_response_id", "conversation", "prompt"):
        fields.refuse(name, f"{_STATELESS}: send the whole conversation as `input`")
    if fields.flag("background") is True:
        fields.refuse("background", _STATELESS)
    tools = read_tools(fields)
    is_offered, forced = read_choice_of_tools(read_tool_choice(fields), tools.names, "tool_choice")
    reasoning = fields.nested("reasoning")
    text = fields.nested("text")
    ask = Ask(
        messages=read_input(fields),
        sampling=Sampling(
            max_tokens=fields.integer("max_output_tokens", 1, MOST_TOKENS),
            seed=read_seed(fields),
            options=read_sampling_options(fields, vocab),
        ),
        tools=tools.functions if is_offered else (),
        forced=forced,
        is_parallel=fields.flag("parallel_tool_calls") is not False,
        structure=read_response_format(text.nested("format"), "text.format") if text else None,
        template=read_template(fields, reasoning.choice("effort", EFFORTS) if reasoning else None),
        caller=read_caller(fields, key, fields.text("user", 1024)),
        where="input",
    )
    return ask, tools.namespaces


def _head(fields: Fields, model: str, ask: Ask) -> dict[str, Any]:
    """Return what a response says about its request."""
    said = {name: fields.document.get(name) for name in _ECHOED}
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "parallel_tool_calls": ask.is_parallel,
        "tool_choice": fields.document.get("tool_choice") or "auto",
        "tools": fields.document.get("tools") or [],
        "previous_response_id": None,
        "reasoning": fields.document.get("reasoning") or {"effort": None, "summary": None},
        "text": fields.document.get("text") or {"format": {"type": "text"}},
        "truncation": "disabled",
        "store": False,
        **said,
    }


@dataclass(slots=True)
class Item:
    """An item of the output as far as it has come. `kind`: "reasoning", "message" or "function_call"."""

    kind: str
    id: str
    index: int
    call_id: str = ""
    name: str = ""
    namespace: str = ""
    text: str = ""
    status: str = "in_progress"

    def document(self) -> dict[str, Any]:
        """Return the item as a response lists it."""
        head = {"type": self.kind, "id": self.id, "status": self.status}
        if self.kind == "function_call":
            call = {"call_id": self.call_id, "name": self.name, "arguments": self.text}
            return {**head, **call, **({"namespace": self.namespace} if self.namespace else {})}
        content = [self.part()] if self.text or self.status != "in_progress" else []
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}

    def part(self) -> dict[str, Any]:
        """Return the only part of a reasoning or a message."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}


class ResponseWriter:
    """Write one answer as a `response` or as the events that build it up."""

    ping = sse.PING

    def __init__(self, head: dict[str, Any], namespaces: dict[str, str]) -> None:
        self._head, self._namespaces = head, namespaces
        self._items: list[Item] = []
        self._current: Item | None = None
        self._number = 0

    def open(self, index: int, choice: Choice) -> Iterable[bytes]:
        response = self._response("in_progress")
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)

    def write(self, index: int, choice: Choice, parts: list[Part]) -> Iterable[bytes]:
        for part in parts:
            yield from self._add(part)

    def close(self, index: int, choice: Choice) -> Iterable[bytes]:
        is_whole = choice.reason in ("stop", "tool_calls")
        yield from self._leave("completed" if is_whole else "incomplete")

    def end(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        response = self._final(choices[0])
        kind = "completed" if response["status"] == "completed" else "incomplete"
        yield self._event(f"response.{kind}", response=response)

    def fail(self, failure: Failure) -> Iterable[bytes]:
        code = failure.code or ("server_error" if failure.status >= 500 else "invalid_prompt")
        error = {"code": code, "message": failure.message}
        yield self._event("response.failed", response=self._response("failed", error=error))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        choice = choices[0]
        for part in _parts_of(choice):
            for _ in self._add(part):
                pass
        for _ in self.close(0, choice):
            pass
        return self._final(choice)

    def _add(self, part: Part) -> Iterable[bytes]:
        if isinstance(part, ReasoningDelta):
            yield from self._say("reasoning", "rs_", part.text)
        elif isinstance(part, ContentDelta):
            yield from self._say("message", "msg_", part.text)
        elif isinstance(part, CallStart):
            yield from self._enter("function_call", "fc_", part)
        elif isinstance(part, CallArguments):
            assert self._current is not None
            self._current.text += part.text
            yield self._item_event(
                "response.function_call_arguments.delta", self._current, delta=part.text
            )
        else:
            yield from self._leave("completed")

    def _say(self, kind: str, prefix: str, text: str) -> Iterable[bytes]:
        if self._current is None or self._current.kind != kind:
            yield from self._enter(kind, prefix)
        assert self._current is not None
        self._current.text += text
        yield self._part_event(f"response.{_NAMES[kind]}.delta", self._current, delta=text)

    def _enter(self, kind: str, prefix: str, call: CallStart | None = None) -> Iterable[bytes]:
        yield from self._leave("completed")
        item = self._current = Item(kind, new_id(prefix), len(self._items))
        if call is not None:
            item.call_id, item.name = call.id, call.name
            item.namespace = self._namespaces.get(call.name, "")
        self._items.append(item)
        yield self._event(
            "response.output_item.added", output_index=item.index, item=item.document()
        )
        if call is None:
            yield self._part_event("response.content_part.added", item, part=item.part())

    def _leave(self, status: str) -> Iterable[bytes]:
        item, self._current = self._current, None
        if item is None:
            return
        item.status = status
        if item.kind != "function_call":
            yield self._part_event(f"response.{_NAMES[item.kind]}.done", item, text=item.text)
            yield self._part_event("response.content_part.done", item, part=item.part())
        elif status == "completed":
            yield self._item_event(
                "response.function_call_arguments.done",
                item,
                name=item.name,
                arguments=item.text,
            )
        yield self._event(
            "response.output_item.done", output_index=item.index, item=item.document()
        )

    def _part_event(self, kind: str, item: Item, **fields: Any) -> bytes:
        if kind.startswith("response.output_text"):
            fields["logprobs"] = []
        return self._item_event(kind, item, content_index=0, **fields)

    def _item_event(self, kind: str, item: Item, **fields: Any) -> bytes:
        return self._event(kind, item_id=item.id, output_index=item.index, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return sse.named(kind, {"type": kind, "sequence_number": number, **fields})

    def _final(self, choice: Choice) -> dict[str, Any]:
        usage = _usage(choice.usage, choice.reasoning_tokens)
        if choice.reason == "length":
            details = {"reason": "max_output_tokens"}
            return self._response("incomplete", usage=usage, incomplete_details=details)
        status = "cancelled" if choice.reason == "cancelled" else "completed"
        return self._response(status, usage=usage)

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        output = [item.document() for item in self._items]
        empty = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": status, "output": output, **empty, **fields}


_NAMES = {"reasoning": "reasoning_text", "message": "output_text"}


def _parts_of(choice: Choice) -> Iterable[Part]:
    """Return the parts of a finished answer, each whole; calls that were cut off are left out."""
    if choice.made.reasoning:
        yield ReasoningDelta(choice.made.reasoning)
    if choice.made.content:
        yield ContentDelta(choice.made.content)
    for index, call in enumerate(choice.made.complete):
        yield CallStart(index, call.id, call.name)
        yield CallArguments(index, call.arguments)
        yield CallEnd(index)


def _usage(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.new_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.new_tokens,
    }
