"""OpenAI's completions: text goes on as it is, and prompts can be scored."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import Response

from q35c.errors import OptionError, PromptError, RequestError
from q35c.runtime.chat.answer import ContentDelta, Part
from q35c.runtime.prompts import check_ids
from q35c.runtime.tokenizer import Tokenizer
from q35c.serve import sse
from q35c.serve.answer import Choice
from q35c.serve.conversation import (
    Caller,
    Sampling,
    TextModel,
    check_weight,
    make_requests,
    with_stops,
)
from q35c.serve.desk import Desk, new_id
from q35c.serve.errors import CONTEXT_EXCEEDED, Dialect, Failure, error_body
from q35c.serve.fields import Fields
from q35c.serve.incoming import Incoming
from q35c.serve.openai import LEAST_LOGPROB, read_stream, usage_of
from q35c.serve.options import (
    MOST_CHOICES,
    MOST_LOGPROBS,
    MOST_TOKENS,
    read_caller,
    read_sampling_options,
    read_seed,
    read_stop,
    read_structure,
)
from q35c.serve.request import Request, Serving, Structure, Token

MOST_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class TextAsk:
    """Prompts to go on with. `is_echo`: the answer begins with the prompt."""

    prompts: list[Any]
    sampling: Sampling
    caller: Caller
    is_echo: bool = False
    structure: Structure | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows ready for the engine, and the texts that their answers begin with."""

    requests: list[Request]
    echoes: list[str]


async def answer_completions(desk: Desk, incoming: Incoming) -> Response:
    """Answer prompts."""
    fields = await incoming.fields()
    name = desk.check_model(fields)
    ask = read_completion(fields, desk.model.vocab_size, incoming.key)
    is_stream, wants_usage = read_stream(fields)
    desk.metrics.count_unknown_fields(fields.count_unread())
    seconds = desk.settings.queue_seconds
    batch = await desk.run(lambda: prepare_texts(desk.model, desk.engine, ask, seconds))
    writer = CompletionWriter(name, desk.model.tokenizer, batch.echoes, wants_usage, ask.sampling)
    choices = [Choice() for _ in batch.requests]
    return desk.reply(incoming, batch.requests, choices, writer, is_stream)


def read_completion(fields: Fields, vocab: int, key: int) -> TextAsk:
    """Return what a request for completions asks. Raises OptionError, RequestError."""
    fields.refuse("prompt_embeds", "embeddings are not taken in")
    fields.refuse("suffix", "the model does not fill in between")
    count = fields.integer("n", 1, MOST_CHOICES) or 1
    if (best := fields.integer("best_of", 1, MOST_CHOICES)) is not None and best != count:
        raise RequestError("all answers are returned", where="best_of", expected=f"{count}, as n")
    limit = fields.integer("max_tokens", 0, MOST_TOKENS)
    sampling = Sampling(
        max_tokens=DEFAULT_MAX_TOKENS if limit is None else limit,
        count=count,
        seed=read_seed(fields),
        stop=read_stop(fields),
        logprobs=_read_logprobs(fields),
        options=read_sampling_options(fields, vocab),
    )
    return TextAsk(
        prompts=read_prompts(fields, count),
        sampling=sampling,
        caller=read_caller(fields, key, fields.text("user", 1024)),
        is_echo=fields.flag("echo") is True,
        structure=read_structure(fields),
    )


def _read_logprobs(fields: Fields) -> int | None:
    """Return how many of the likeliest tokens are wanted; true is what chat clients send."""
    if isinstance(fields.value("logprobs"), bool):
        return 0 if fields.flag("logprobs") else None
    return fields.integer("logprobs", 0, MOST_LOGPROBS)


def read_prompts(fields: Fields, count: int) -> list[Any]:
    """Return each prompt, a text or ids. Raises OptionError."""
    value = fields.require("prompt", fields.value("prompt"))
    is_single = isinstance(value, str) or (isinstance(value, list) and _is_id_list(value))
    prompts = [value] if is_single else value
    expected = "a text, token ids, or a list of those"
    if not isinstance(prompts, list) or not all(isinstance(p, (str, list)) for p in prompts):
        raise OptionError("not a prompt", where="prompt", expected=expected)
    if not 1 <= len(prompts) * count <= MOST_PROMPTS:
        raise OptionError(
            "too many prompts", where="prompt", expected=f"{MOST_PROMPTS} answers in all"
        )
    return prompts


def _is_id_list(value: list[Any]) -> bool:
    return bool(value) and not isinstance(value[0], (str, list))


def prepare_texts(model: TextModel, engine: Serving, ask: TextAsk, queue_seconds: float) -> Batch:
    """Return the rows of prompts. For a worker thread."""
    sampling = ask.sampling
    constraint = engine.compile(ask.structure) if ask.structure else None
    stops, stop_ids = model.tokenizer.split_stops(sampling.stop)
    batch = Batch([], [])
    for prompt in ask.prompts:
        ids = _encode(model, prompt)
        made = make_requests(model, ids, sampling, ask.caller, queue_seconds, constraint, "prompt")
        is_scoring = ask.is_echo and sampling.logprobs is not None
        rows = [replace(with_stops(row, stops, stop_ids), is_scoring=is_scoring) for row in made]
        batch.requests.extend(rows)
        echo = ""
        if ask.is_echo:
            echo = prompt if isinstance(prompt, str) else _text(model.tokenizer, ids)
        batch.echoes.extend([echo] * len(rows))
    return batch


def _encode(model: TextModel, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        check_weight(model, prompt, "prompt")
        prompt = model.tokenizer.encode(prompt)
    if len(prompt) > model.context:
        raise RequestError(
            f"the context is {model.context} tokens, the prompt {len(prompt)}",
            where="prompt",
            code=CONTEXT_EXCEEDED,
        )
    try:
        return check_ids(prompt, model.vocab_size, model.context)
    except PromptError as error:
        error.where = "prompt"
        raise


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def _finite(logprob: float | None) -> Any:
    """Return a logprob as JSON can say it."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


class CompletionWriter:
    """Write answers as `text_completion` objects."""

    ping = sse.PING

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        echoes: Sequence[str],
        wants_usage: bool,
        sampling: Sampling,
    ) -> None:
        self._head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._tokenizer, self._echoes = tokenizer, echoes
        self._wants_usage = wants_usage
        self._count, self._logprobs = sampling.count, sampling.logprobs
        self._is_echoed: set[int] = set()
        self._offsets = [0] * len(echoes)

    def open(self, index: int, choice: Choice) -> Iterable[bytes]:
        return ()

    def write(self, index: int, choice: Choice, parts: list[Part]) -> Iterable[bytes]:
        text = self._echo(index)
        text += "".join(part.text for part in parts if isinstance(part, ContentDelta))
        if text:
            yield self._chunk(index, choice, text)

    def close(self, index: int, choice: Choice) -> Iterable[bytes]:
        yield self._chunk(index, choice, self._echo(index), choice.reason)

    def end(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        if self._wants_usage:
            yield sse.data({**self._head, "choices": [], "usage": self._usage(choices)})
        yield sse.DONE

    def fail(self, failure: Failure) -> Iterable[bytes]:
        yield sse.data(error_body(Dialect.OPENAI, failure))
        yield sse.DONE

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        listed = [
            self._choice(index, choice, self._echo(index) + choice.made.content, choice.reason)
            for index, choice in enumerate(choices)
        ]
        return {**self._head, "choices": listed, "usage": self._usage(choices)}

    def _echo(self, index: int) -> str:
        """Return what the answer begins with, once."""
        if index in self._is_echoed:
            return ""
        self._is_echoed.add(index)
        return self._echoes[index]

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the usage of all prompts; the answers of one share it."""
        usage = usage_of([choice.usage for choice in choices], 0)
        firsts = [choice.usage for choice in choices[:: self._count]]
        usage["prompt_tokens"] = sum(first.prompt_tokens for first in firsts)
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        usage["prompt_tokens_details"] = {"cached_tokens": sum(f.cached_tokens for f in firsts)}
        return usage

    def _chunk(self, index: int, choice: Choice, text: str, reason: str | None = None) -> bytes:
        return sse.data({**self._head, "choices": [self._choice(index, choice, text, reason)]})

    def _choice(self, index: int, choice: Choice, text: str, reason: str | None) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._listed(index, choice)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _listed(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return the logprobs of the tokens since the last call, those of an echoed prompt first."""
        tokens = [*choice.take_prompt(), *choice.take_tokens()]
        texts = [_text(self._tokenizer, [token.id]) for token in tokens]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if self._logprobs else None,
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """Return the likeliest tokens by their texts, and the token itself; None for a prompt's first."""
        if token.logprob is None:
            return None
        pairs = [*token.top, (token.id, token.logprob)]
        return {_text(self._tokenizer, [id_]): _finite(logprob) for id_, logprob in pairs}
