"""OpenAI's chat completions: the dialect of most clients."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.responses import Response

from q35c.errors import OptionError
from q35c.runtime.chat.answer import CallArguments, CallStart, ContentDelta, Part, ReasoningDelta
from q35c.runtime.tokenizer import Tokenizer
from q35c.serve import sse
from q35c.serve.answer import Choice
from q35c.serve.conversation import Ask, Sampling
from q35c.serve.desk import Desk, new_id
from q35c.serve.errors import Dialect, Failure, error_body
from q35c.serve.fields import Fields
from q35c.serve.incoming import Incoming
from q35c.serve.options import (
    MOST_CHOICES,
    MOST_LOGPROBS,
    MOST_MESSAGES,
    MOST_TOKENS,
    MOST_TOOLS,
    check_tool_name,
    make_tool,
    read_caller,
    read_choice_of_tools,
    read_sampling_options,
    read_seed,
    read_stop,
    read_structure,
    read_template,
)
from q35c.serve.request import Token, Usage

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not know
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


async def answer_chat(desk: Desk, incoming: Incoming) -> Response:
    """Answer a conversation."""
    fields = await incoming.fields()
    name = desk.check_model(fields)
    ask = read_chat(fields, desk.model.vocab_size, incoming.key)
    is_stream, wants_usage = read_stream(fields)
    desk.metrics.count_unknown_fields(fields.count_unread())
    writer = ChatWriter(
        new_id("chatcmpl-"),
        name,
        desk.model.tokenizer,
        reasoning_field=desk.settings.reasoning_field,
        wants_logprobs=ask.sampling.logprobs is not None,
        wants_usage=wants_usage,
    )
    return desk.reply_to(incoming, ask, await desk.prepare(ask), writer, is_stream)


def read_chat(fields: Fields, vocab: int, key: int) -> Ask:
    """Return the conversation of a chat request. Raises OptionError, RequestError."""
    messages = read_messages(fields)
    tools = read_tools(fields)
    names = tuple(tool["function"]["name"] for tool in tools)
    is_offered, forced = read_choice_of_tools(_tool_choice(fields), names, "tool_choice")
    return Ask(
        messages=messages,
        sampling=_read_sampling(fields, vocab),
        tools=tools if is_offered else (),
        forced=forced,
        is_parallel=fields.flag("parallel_tool_calls") is not False,
        structure=read_structure(fields),
        thinking_tokens=fields.integer("thinking_budget", 0, MOST_TOKENS),
        template=read_template(fields, fields.choice("reasoning_effort", EFFORTS)),
        is_continued=fields.flag("continue_final_message") is True,
        caller=read_caller(fields, key, fields.text("user", 1024)),
    )


def read_messages(fields: Fields) -> list[Any]:
    """Return the messages as they are; the normaliser looks at each. Raises OptionError."""
    messages = fields.require("messages", fields.objects("messages", MOST_MESSAGES))
    if not messages:
        raise OptionError("the conversation is empty", where="messages", expected="1 message")
    for message in messages:
        if message.value("role") == "tool":
            message.require("tool_call_id", message.text("tool_call_id", 256))
        if message.value("role") != "assistant":
            message.require("content", message.value("content"))
    return [dict(message.document) for message in messages]


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """Return whether an answer is streamed, and whether its usage is wanted at the end of the stream."""
    is_stream = fields.flag("stream") is True
    options = fields.nested("stream_options")
    return is_stream, options is not None and options.flag("include_usage") is True


def _read_sampling(fields: Fields, vocab: int) -> Sampling:
    limits = [fields.integer(n, 1, MOST_TOKENS) for n in ("max_completion_tokens", "max_tokens")]
    wants = fields.flag("logprobs") is True
    top = fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    return Sampling(
        max_tokens=next((limit for limit in limits if limit is not None), None),
        count=fields.integer("n", 1, MOST_CHOICES) or 1,
        seed=read_seed(fields),
        stop=read_stop(fields),
        logprobs=(top or 0) if wants else None,
        options=read_sampling_options(fields, vocab),
    )


def read_tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    """Return the tools of a request, each rebuilt of what is known of it."""
    made: list[dict[str, Any]] = []
    for tool in fields.objects("tools", MOST_TOOLS) or ():
        tool.require("type", tool.choice("type", ("function",)))
        function = tool.require("function", tool.nested("function"))
        name = check_tool_name(function.value("name"), function.path("name"))
        description = function.text("description")
        where = function.path("parameters")
        made.append(make_tool(name, description, function.value("parameters"), where))
    return tuple(made)


def _tool_choice(fields: Fields) -> Any:
    value = fields.value("tool_choice")
    if not isinstance(value, dict):
        return value
    named = fields.nested("tool_choice")
    function = named.nested("function") if named else None
    if function is None:
        raise OptionError(
            "not a choice of tools", where="tool_choice.function", expected='{"name": ...}'
        )
    return check_tool_name(function.value("name"), "tool_choice.function.name")


class ChatWriter:
    """Write one answer as `chat.completion` or as its chunks."""

    ping = sse.PING

    def __init__(
        self,
        identity: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        reasoning_field: str,
        wants_logprobs: bool,
        wants_usage: bool,
    ) -> None:
        self._head = {"id": identity, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._reasoning_field = reasoning_field
        self._wants_logprobs, self._wants_usage = wants_logprobs, wants_usage

    def open(self, index: int, choice: Choice) -> Iterable[bytes]:
        yield self._chunk(index, choice, {"role": "assistant", "content": ""})

    def write(self, index: int, choice: Choice, parts: list[Part]) -> Iterable[bytes]:
        for part in parts:
            if (delta := self._delta(part)) is not None:
                yield self._chunk(index, choice, delta)

    def close(self, index: int, choice: Choice) -> Iterable[bytes]:
        yield self._chunk(index, choice, {}, choice.reason)

    def end(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        if self._wants_usage:
            usage = usage_of([choice.usage for choice in choices], _reasoning(choices))
            yield sse.data({**self._chunk_head(), "choices": [], "usage": usage})
        yield sse.DONE

    def fail(self, failure: Failure) -> Iterable[bytes]:
        yield sse.data(error_body(Dialect.OPENAI, failure))
        yield sse.DONE

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage_of([choice.usage for choice in choices], _reasoning(choices)),
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        calls = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in choice.made.complete
        ]
        content = None if calls and not choice.made.content else choice.made.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if choice.made.reasoning:
            message[self._reasoning_field] = choice.made.reasoning
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.reason,
        }

    def _delta(self, part: Part) -> dict[str, Any] | None:
        if isinstance(part, ReasoningDelta):
            return {self._reasoning_field: part.text}
        if isinstance(part, ContentDelta):
            return {"content": part.text}
        call: dict[str, Any]
        if isinstance(part, CallStart):
            call = {
                "id": part.id,
                "type": "function",
                "function": {"name": part.name, "arguments": ""},
            }
        elif isinstance(part, CallArguments):
            call = {"function": {"arguments": part.text}}
        else:
            return None
        return {"tool_calls": [{"index": part.index, **call}]}

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _chunk(
        self, index: int, choice: Choice, delta: dict[str, Any], reason: str | None = None
    ) -> bytes:
        piece = {"index": index, "delta": delta, "finish_reason": reason}
        if self._wants_logprobs:
            piece["logprobs"] = self._logprobs(choice)
        return sse.data({**self._chunk_head(), "choices": [piece]})

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        tokens = choice.take_tokens()
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: Token) -> dict[str, Any]:
        top = [self._entry(*pair) for pair in token.top]
        return {**self._entry(token.id, token.logprob or 0.0), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        is_whole = "\ufffd" not in text  # a part of a character has no text of its own
        return {
            "token": text,
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(text.encode()) if is_whole else None,
        }


def usage_of(usages: Sequence[Usage], reasoning_tokens: int) -> dict[str, Any]:
    """Return OpenAI's usage of an answer whose rows share their prompt."""
    prompt = usages[0].prompt_tokens if usages else 0
    new = sum(usage.new_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens if usages else 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def _reasoning(choices: Sequence[Choice]) -> int:
    return sum(choice.reasoning_tokens for choice in choices)
