"""Answer a conversation: messages in, reasoning, content and tool calls out, whole or as they come."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from q35c import arguments
from q35c.errors import MemoryRefused, OptionError
from q35c.runtime.chat.answer import (
    CLOSE_THINK,
    OPEN_THINK,
    AnswerParser,
    CallArguments,
    CallStart,
    ContentDelta,
    Part,
    ReasoningDelta,
)
from q35c.runtime.chat.normalise import normalise
from q35c.runtime.generate import UNLIMITED, Row, Stream, resolve_options, run_rows
from q35c.runtime.memory import state_bytes
from q35c.runtime.prefix import MESSAGE_START, Lease, PrefixCache, last_cut
from q35c.runtime.prompts import check_ids
from q35c.runtime.tokenizer import StopScanner, Tokenizer

if TYPE_CHECKING:
    from q35c.runtime.model import Model
    from q35c.runtime.session import Session

_KEPT_SESSIONS = 2  # full ones, whose memory a conversation may keep
ChatFinishReason = Literal["stop", "tool_calls", "length", "context", "cancelled"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model asks to be called. `arguments_text` is the JSON text of `arguments`."""

    id: str
    name: str
    arguments_text: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments by name."""
        return json.loads(self.arguments_text)


@dataclass(frozen=True, slots=True)
class ChatUsage:
    """Tokens and seconds of an answer.

    cached_tokens       of the prompt: they were not computed again
    reasoning_tokens    of the new ones
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    reasoning_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_tokens_per_second(self) -> float:
        """Return the rate of the tokens after the first, which the prefill yields."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What the model answered.

    tool_calls      complete ones only
    finish_reason   "stop", "tool_calls" (it ended by itself, with calls), "length", "context" (no room left) or
                    "cancelled"
    stop            the stop id or stop string that ended it, else None
    seed            the seed, also where none was given
    """

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: ChatFinishReason
    stop: int | str | None
    seed: int
    usage: ChatUsage

    @property
    def message(self) -> dict[str, Any]:
        """Return the answer as a message, for the history."""
        made: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            made["reasoning_content"] = self.reasoning
        if self.tool_calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return made


class ChatStream(Iterator[Part]):
    """Yield the parts of an answer as they are generated. For one thread at a time.

    `result` holds the answer so far; `close`, or dropping the stream, cancels.
    """

    def __init__(
        self,
        row: Row,
        stream: Stream,
        parser: AnswerParser,
        stops: tuple[str, ...],
        cached_tokens: int,
        fill_seconds: float,
    ) -> None:
        """Made by `Model.chat` and `Conversation.answer`."""
        self._row, self._stream, self._parser = row, stream, parser
        self._scanner = StopScanner(stops)
        self._ready: deque[Part] = deque()
        self._is_over = False
        self._reasoning = self._content = ""
        self._calls: list[ToolCall] = []
        self._complete = 0
        self._reasoning_tokens = 0
        self._cached_tokens, self._fill_seconds = cached_tokens, fill_seconds

    def __next__(self) -> Part:
        while not self._ready:
            if self._is_over:
                raise StopIteration
            piece = next(self._stream, None)
            if piece is None:
                self._end()
                continue
            self._take(self._parser.feed(piece))
            if self._parser.is_thinking:
                self._reasoning_tokens = self._row.new_tokens
            if self._scanner.found is not None:
                self._is_over = True
                self._stream.close()
        return self._ready.popleft()

    def close(self) -> None:
        """Stop generating; the result keeps what was generated so far."""
        self._stream.close()
        if not self._is_over:
            self._end()
        self._ready.clear()

    @property
    def result(self) -> ChatAnswer:
        """Return the answer so far."""
        made = self._row.result()
        timings = made.timings
        reason: ChatFinishReason = made.finish_reason
        if self._scanner.found is not None:
            reason = "stop"
        elif reason == "stop" and self._complete:
            reason = "tool_calls"
        return ChatAnswer(
            reasoning=self._reasoning,
            content=self._content,
            tool_calls=tuple(self._calls[: self._complete]),
            finish_reason=reason,
            stop=self._scanner.found or made.stop,
            seed=made.seed,
            usage=ChatUsage(
                prompt_tokens=timings.prompt_tokens,
                cached_tokens=self._cached_tokens,
                new_tokens=timings.new_tokens,
                reasoning_tokens=self._reasoning_tokens,
                prefill_seconds=self._fill_seconds + timings.prefill_seconds,
                decode_seconds=timings.decode_seconds,
            ),
        )

    def _end(self) -> None:
        self._is_over = True
        if self._parser.is_thinking:
            self._reasoning_tokens = self._row.new_tokens
        self._take(self._parser.finish(self._row.finish_reason != "stop"))
        if self._scanner.found is None and (rest := self._scanner.finish()):
            self._say(rest)

    def _take(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if self._scanner.found is None:
                self._take_one(part)

    def _take_one(self, part: Part) -> None:
        if isinstance(part, ContentDelta):
            self._say(self._scanner.push(part.text))
            return
        if isinstance(part, ReasoningDelta):
            self._reasoning += part.text
        elif isinstance(part, CallStart):
            self._say(self._scanner.finish())
            self._calls.append(ToolCall(part.id, part.name, ""))
        elif isinstance(part, CallArguments):
            call = self._calls[-1]
            self._calls[-1] = replace(call, arguments_text=call.arguments_text + part.text)
        else:
            self._complete += 1
        self._ready.append(part)

    def _say(self, text: str) -> None:
        if text:
            self._content += text
            self._ready.append(ContentDelta(text))


class Conversation:
    """Answers of one model to one conversation after the other, which mostly go on from each other.

    Keeps a session between answers, so that only what is new of a conversation is computed, and no bit of an answer
    depends on it. For one thread at a time.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        most_bytes = _KEPT_SESSIONS * state_bytes(model.manifest, model.context)
        start = model.tokenizer.token_id(MESSAGE_START)
        self._cache = PrefixCache(model.session, model.manifest, most_bytes, start)
        self._lease: Lease | None = None
        self._stream: ChatStream | None = None

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End an answer that is under way, and give the sessions back. May be called again."""
        self._end()
        self._cache.close()

    def answer(self, messages: Sequence[Any], **options: Any) -> ChatStream:
        """Answer a conversation; options as of `Model.chat`. Closes an earlier stream that has not ended."""
        self._end()
        self._stream = start_chat(self._model, messages, self._fill, **options)
        return self._stream

    def _fill(self, prompt: Sequence[int], most_tokens: int) -> Lease:
        """Return a session that holds all of a prompt but its last slice."""
        context = min(self._model.context, len(prompt) + most_tokens)
        while self._lease is None:
            try:
                self._lease = self._cache.open(prompt, context)
            except MemoryRefused:
                if not self._cache.shrink():
                    raise
        while self._lease.session.length < last_cut(len(prompt)):
            self._lease.advance()
        return self._lease

    def _end(self) -> None:
        stream, self._stream = self._stream, None
        lease, self._lease = self._lease, None
        if stream is not None:
            stream.close()
        if lease is not None:
            lease.end()


Fill = Callable[[Sequence[int], int], Lease]  # a prompt, and the most tokens that come after it


def start_chat(
    model: Model,
    messages: Sequence[Any],
    fill: Fill | None = None,
    *,
    tools: Sequence[Any] | None = None,
    thinking: bool | None = None,
    template: Mapping[str, Any] | None = None,
    max_new_tokens: int | None = UNLIMITED,
    **options: Any,
) -> ChatStream:
    """Begin to answer a conversation. See `Model.chat`; `fill` finds a session for its prompt."""
    variables = _variables(template, thinking)
    tokenizer = model.tokenizer
    prompt = model.encode_chat(normalise(messages), tools=tools, **variables)
    prompt = check_ids(prompt, model.vocab_size, model.context)
    resolved = resolve_options(
        model.manifest.generation, model.vocab_size, max_new_tokens=max_new_tokens, **options
    )
    # Stop strings are for what is read, not for reasoning and calls.
    texts, stop_ids = tokenizer.split_stops(resolved.stop)
    resolved = replace(resolved, stop=(), stop_ids=resolved.stop_ids | stop_ids)
    parser = AnswerParser(tools, begins_thinking(tokenizer, prompt))
    begin = time.perf_counter()
    lease = None if fill is None else fill(prompt, resolved.max_new_tokens)
    seconds = time.perf_counter() - begin
    session = None if lease is None else lease.session
    held = None if session is None else session.length
    row = Row(prompt, resolved, resolved.seed, tokenizer, session, held)

    def open_session(prompt_tokens: int) -> Session:
        return model.session(min(model.context, prompt_tokens + resolved.max_new_tokens))

    stream = Stream([row], run_rows([row], 1, open_session), True)
    cached = 0 if lease is None else lease.cached_tokens
    return ChatStream(row, stream, parser, texts, cached, seconds)


def begins_thinking(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Say whether an answer begins inside reasoning: the prompt's last turn opens it and does not close it."""
    control = set(tokenizer.special_tokens.values())
    places = (place for place in range(len(prompt) - 1, -1, -1) if prompt[place] in control)
    begin = next(places, -1) + 1
    text = tokenizer.decode(prompt[begin:], skip_special_tokens=False)
    return text.rfind(OPEN_THINK) > text.rfind(CLOSE_THINK)


def _variables(template: Mapping[str, Any] | None, thinking: bool | None) -> dict[str, Any]:
    """Return the template's variables. Raises OptionError."""
    if not isinstance(cast(object, template), (Mapping, type(None))):
        raise OptionError(
            "value is not allowed",
            where="template",
            expected="a mapping of variables",
            got=template,
        )
    made = dict(template or {})
    if thinking is not None:
        made["enable_thinking"] = arguments.flag("thinking", thinking)
    return made
