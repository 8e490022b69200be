"""Answer a conversation: messages in, reasoning, content and tool calls out, whole or as they come."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from q35c import arguments
from q35c.errors import OptionError
from q35c.runtime.answers import ChatAnswer, ChatFinishReason, ChatUsage, ToolCall
from q35c.runtime.chat.answer import (
    CLOSE_THINK,
    OPEN_THINK,
    AnswerParser,
    Part,
    tool_schemas,
)
from q35c.runtime.chat.normalise import normalise
from q35c.runtime.gathered import Gathered
from q35c.runtime.generate import UNLIMITED, Row, Stream, resolve_options, run_rows
from q35c.runtime.grammar import Matcher
from q35c.runtime.lease import Lease
from q35c.runtime.memory import state_bytes
from q35c.runtime.multimodal import Prompt, check_prompt, token_ids
from q35c.runtime.prefix import PrefixCache
from q35c.runtime.session import Session
from q35c.runtime.structures import Wanted, read_format, read_tool_choice
from q35c.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from q35c.runtime.model import Model

_KEPT_SESSIONS = 2  # full ones, whose memory a conversation may keep


class _Row(Row):
    """A row that says how much of its prompt was computed before."""

    cached_tokens: int = 0

    def start(self, place: Session | Lease) -> str:
        """Prefill the prompt, and sample the first token."""
        self.cached_tokens = place.cached_tokens if isinstance(place, Lease) else 0
        return super().start(place)


class ChatStream(Iterator[Part]):
    """Yield the parts of an answer as they are generated. For one thread at a time.

    `result` holds the answer so far; `close`, or dropping the stream, cancels.
    """

    def __init__(
        self,
        row: _Row,
        stream: Stream,
        parser: AnswerParser,
        stops: tuple[str, ...],
        is_parallel: bool,
    ) -> None:
        """Made by `Model.chat` and `Conversation.answer`."""
        self._row, self._stream, self._parser = row, stream, parser
        self._made = Gathered(parser, stops, is_parallel=is_parallel)
        self._ready: deque[Part] = deque()
        self._is_over = False
        self._reasoning_tokens = 0

    def __next__(self) -> Part:
        while not self._ready:
            if self._is_over:
                raise StopIteration
            piece = next(self._stream, None)
            if piece is None:
                self._end()
                continue
            self._ready += self._made.feed(piece)
            if self._parser.is_thinking:
                self._reasoning_tokens = self._row.new_tokens
            if self._made.has_enough:
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
        row, made = self._row.result(), self._made
        timings = row.timings
        reason: ChatFinishReason = row.finish_reason
        if made.has_enough or reason == "stop":
            reason = "tool_calls" if made.complete else "stop"
        return ChatAnswer(
            reasoning=made.reasoning,
            content=made.content,
            tool_calls=tuple(
                ToolCall(call.id, call.name, call.arguments) for call in made.complete
            ),
            finish_reason=reason,
            stop=made.stop or row.stop,
            seed=row.seed,
            usage=ChatUsage(
                prompt_tokens=timings.prompt_tokens,
                cached_tokens=self._row.cached_tokens,
                new_tokens=timings.new_tokens,
                reasoning_tokens=self._reasoning_tokens,
                prefill_seconds=timings.prefill_seconds,
                decode_seconds=timings.decode_seconds,
            ),
        )

    def _end(self) -> None:
        self._is_over = True
        if self._parser.is_thinking:
            self._reasoning_tokens = self._row.new_tokens
        self._ready += self._made.finish(self._row.finish_reason != "stop")


class Conversation:
    """Answers of one model to one conversation after the other, which mostly go on from each other.

    Keeps a session between answers, so that only what is new of a conversation is computed, and no bit of an answer
    depends on it. For one thread at a time.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._cache = model.cache(_KEPT_SESSIONS * state_bytes(model.manifest, model.context))
        self._stream: ChatStream | None = None

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End an answer that is under way, and give the sessions back. May be called again."""
        self._end()
        self._cache.close()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write what was computed to files below a directory, for `load`. Raises OptionError, DiskRefused."""
        self._end()
        self._cache.save(directory)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Go on from what `save` has written for this model. Raises OptionError for a directory that cannot be."""
        self._cache.load(directory)

    def answer(self, messages: Sequence[Any], **options: Any) -> ChatStream:
        """Answer a conversation; options as of `Model.chat`. Closes an earlier stream that has not ended."""
        self._end()
        self._stream = start_chat(self._model, messages, self._cache, **options)
        return self._stream

    def _end(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


def start_chat(
    model: Model,
    messages: Sequence[Any],
    cache: PrefixCache | None = None,
    *,
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
    allow_files: bool = False,
    tools: Sequence[Any] | None = None,
    thinking: bool | None = None,
    template: Mapping[str, Any] | None = None,
    response_format: Any = None,
    tool_choice: str = "auto",
    parallel_tool_calls: bool = True,
    max_new_tokens: int | None = UNLIMITED,
    **options: Any,
) -> ChatStream:
    """Begin to answer a conversation. See `Model.chat`; `cache` is one of the model's."""
    variables = _variables(template, thinking)
    is_parallel = arguments.flag("parallel_tool_calls", parallel_tool_calls)
    tokenizer = model.tokenizer
    is_offered, wanted = read_tool_choice(tool_choice, tool_schemas(tools))
    wanted = wanted or read_format(response_format)
    tools = tools if is_offered else None
    prompting = model.prompting
    places, attachments = prompting.take(messages, images, videos, allow_files)
    prompt = prompting.encode_places(normalise(places), attachments, tools=tools, **variables)
    prompt = check_prompt(prompt, model.manifest, model.context)
    resolved = resolve_options(
        model.manifest.generation, model.vocab_size, max_new_tokens=max_new_tokens, **options
    )
    # Stop strings are for what is read, not for reasoning and calls.
    texts, stop_ids = tokenizer.split_stops(resolved.stop)
    resolved = replace(resolved, stop=(), stop_ids=resolved.stop_ids | stop_ids)
    is_thinking = begins_thinking(tokenizer, token_ids(prompt))
    parser = AnswerParser(tools, is_thinking)
    matcher = find_matcher(model, wanted, is_thinking, is_parallel)
    row = _Row(prompt, resolved, resolved.seed, tokenizer)
    row.matcher = matcher

    def open_session(prompt: Prompt) -> Session | Lease:
        context = min(model.context, len(prompt) + resolved.max_new_tokens)
        return model.session(context) if cache is None else cache.open(prompt, context)

    return ChatStream(
        row, Stream([row], run_rows([row], 1, open_session), True), parser, texts, is_parallel
    )


def find_matcher(
    model: Model, wanted: Wanted | None, is_thinking: bool, is_parallel: bool = True
) -> Matcher | None:
    """Return what follows an answer's structure. Raises OptionError, ToolchainError."""
    if wanted is None:
        return None
    constraint = model.grammars.compile(
        wanted.kind,
        wanted.value,
        where=wanted.where,
        is_thinking=is_thinking,
        is_parallel=is_parallel,
    )
    return constraint.matcher()


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
