"""From a conversation in any dialect to requests for the engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from q35c.artifact import Manifest
from q35c.errors import RequestError, ToolchainError
from q35c.runtime.answering import begins_thinking
from q35c.runtime.chat.normalise import normalise
from q35c.runtime.generate import GenerationOptions, resolve_options
from q35c.runtime.multimodal import MultimodalPrompt, Prompt, token_ids
from q35c.runtime.prompting import Prompting
from q35c.runtime.sampling import MAX_SEED
from q35c.runtime.tokenizer import Tokenizer
from q35c.serve.errors import CONTEXT_EXCEEDED
from q35c.serve.request import Request, Serving, Structure

MOST_CHARACTERS_A_TOKEN = 16  # longer text is refused before the tokenizer sees it


class TextModel(Protocol):
    """What of a `Model` a server reads; sessions are the engine's."""

    context: int
    batch: int

    @property
    def manifest(self) -> Manifest: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def prompting(self) -> Prompting: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How rows are sampled, cut and reported; the same in every dialect. None: as the checkpoint says."""

    max_tokens: int | None = None
    count: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: `key` numbers the API key, the texts are of a fixed alphabet."""

    key: int = 0
    user: str = ""
    salt: str = ""
    priority: int = 0

    @property
    def own_salt(self) -> str:
        """Return what separates this key's beginnings of prompts, and what it shows, from others'."""
        return f"{self.key}:{self.salt}"


@dataclass(frozen=True, slots=True)
class Ask:
    """A conversation to answer, whatever dialect it came in.

    messages, tools     in OpenAI's form; `where` is the field that errors of the whole name
    forced              names of the tools of which one must be called; none: the model is free
    structure           what the answer must look like, else None
    thinking_tokens     tokens after which reasoning is closed where the answer has a structure; None: no limit
    template            variables for the template
    is_continued        the last message is the beginning of the answer
    """

    messages: list[Any]
    sampling: Sampling
    tools: tuple[dict[str, Any], ...] = ()
    forced: tuple[str, ...] = ()
    is_parallel: bool = True
    structure: Structure | None = None
    thinking_tokens: int | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    is_continued: bool = False
    caller: Caller = Caller()
    where: str = "messages"


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows ready for the engine. `stops` are the stop strings that no engine looks for: those of content alone."""

    requests: tuple[Request, ...]
    is_thinking: bool = False
    stops: tuple[str, ...] = ()


def encode(
    model: TextModel, ask: Ask, allow_videos: bool = False, *, is_blank: bool = False
) -> Prompt:
    """Return a conversation's prompt. For a worker thread: it opens pictures and lets the model see them, unless `is_blank`.

    Raises RequestError, OptionError, MediaError, PromptError, TokenizerError; of pictures they name the part.
    """
    messages, attachments = model.prompting.take(ask.messages)
    clip = next((one for one in attachments if one.is_clip), None)
    if clip is not None and not allow_videos:
        raise RequestError("this server takes no clips", where=clip.where, expected="text or image")
    check_weight(model, [messages, list(ask.tools)], ask.where)
    options = dict(ask.template)
    if ask.is_continued:
        options["continue_final_message"] = True
    tools = list(ask.tools) or None
    salt = ask.caller.own_salt
    try:
        return model.prompting.encode_places(
            normalise(messages), attachments, tools=tools, salt=salt, is_blank=is_blank, **options
        )
    except ToolchainError as error:  # of packages, which are not the client's to install
        where = attachments[0].where if attachments else ask.where
        raise RequestError("this server opens no pictures", where=where) from error


def prepare(
    model: TextModel, engine: Serving, ask: Ask, queue_seconds: float, allow_videos: bool = False
) -> Prepared:
    """Return the requests of an answer. For a worker thread: it renders, tokenises, sees and compiles grammars."""
    ids = encode(model, ask, allow_videos)
    is_thinking = begins_thinking(model.tokenizer, token_ids(ids))
    structure = _structure(ask)
    constraint = None
    if structure is not None:
        budget = ask.thinking_tokens
        structure = replace(structure, is_thinking=is_thinking, thinking_tokens=budget)
        constraint = engine.compile(structure)
    stops, stop_ids = model.tokenizer.split_stops(ask.sampling.stop)
    requests = make_requests(
        model, ids, ask.sampling, ask.caller, queue_seconds, constraint, ask.where
    )
    requests = [with_stops(request, (), stop_ids) for request in requests]
    return Prepared(tuple(requests), is_thinking, stops)


def make_requests(
    model: TextModel,
    ids: Prompt,
    sampling: Sampling,
    caller: Caller,
    queue_seconds: float,
    constraint: Any = None,
    where: str = "messages",
) -> list[Request]:
    """Return a request for each copy; the most tokens are cut to what the context leaves."""
    room = model.context - len(ids)
    least = 0 if sampling.max_tokens == 0 else 1
    if room < least:
        raise RequestError(
            f"the context is {model.context} tokens, the prompt {len(ids)}",
            where=where,
            code=CONTEXT_EXCEEDED,
            hint="shorten it",
        )
    options = _options(model, sampling, room)
    deadline = time.monotonic() + queue_seconds
    first = Request(
        ids=ids if isinstance(ids, MultimodalPrompt) else tuple(ids),
        options=options,
        client=f"{caller.key}:{caller.user}",
        priority=caller.priority,
        salt=caller.own_salt,
        logprobs=sampling.logprobs,
        constraint=constraint,
        deadline=deadline,
        group="" if sampling.count == 1 else f"{id(ids):x}-{options.seed:x}",
    )
    return [
        replace(first, options=replace(options, seed=(options.seed + index) % (MAX_SEED + 1)))
        for index in range(sampling.count)
    ]


def _options(model: TextModel, sampling: Sampling, room: int) -> GenerationOptions:
    options = resolve_options(
        model.manifest.generation,
        model.vocab_size,
        max_new_tokens=1,
        seed=sampling.seed,
        **sampling.options,
    )
    asked = room if sampling.max_tokens is None else sampling.max_tokens
    return replace(options, max_new_tokens=min(asked, room))


def with_stops(request: Request, stops: tuple[str, ...], stop_ids: frozenset[int]) -> Request:
    """Return a request that also ends at these texts, wherever they occur, and tokens."""
    options = request.options
    options = replace(options, stop=stops, stop_ids=options.stop_ids | stop_ids)
    return replace(request, options=options)


def _structure(ask: Ask) -> Structure | None:
    if not ask.forced:
        return ask.structure
    functions = [tool["function"] for tool in ask.tools]
    offered = tuple(
        (function["name"], function.get("parameters"))
        for function in functions
        if function["name"] in ask.forced
    )
    return Structure("calls", offered, "tools", is_parallel=ask.is_parallel)


def check_weight(model: TextModel, value: Any, where: str) -> None:
    """Raise RequestError for texts that no context could hold, before they are tokenised."""
    most = model.context * MOST_CHARACTERS_A_TOKEN
    if (weight := count_characters(value)) > most:
        raise RequestError(
            f"the context is {model.context} tokens, too few for {weight} characters",
            where=where,
            code=CONTEXT_EXCEEDED,
        )


def count_characters(value: Any) -> int:
    """Return the characters of all texts in JSON values, keys included."""
    count, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            count += len(item)
        elif isinstance(item, Mapping):
            left.extend(item)
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
    return count
