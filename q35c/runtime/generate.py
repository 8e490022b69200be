"""The generation loop: prompts in, text out, several rows decoded together.

Every prompt is a row with its own session, random stream and text stream. Up to `batch` rows are decoded
in one step; when one ends, the next waiting prompt takes its place. Rows never see each other, so a
prompt's result does not depend on what else is generated beside it.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

from q35c import arguments
from q35c.artifact.leaves import Generation as Defaults
from q35c.errors import MemoryRefused, OptionError
from q35c.runtime.device import Logits
from q35c.runtime.grammar import Matcher
from q35c.runtime.lease import Lease
from q35c.runtime.multimodal import Prompt, token_ids
from q35c.runtime.sampling import MAX_SEED, Mask, Sampler, SamplingOptions
from q35c.runtime.session import Session
from q35c.runtime.tokenizer import StopScanner, TextStream, Tokenizer, check_stops

DEFAULT_MAX_NEW_TOKENS = 128
UNLIMITED = -1  # as max_new_tokens: until a stop, or until the context is full
FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True, slots=True)
class Timings:
    """Tokens and seconds of one row; steps that rows share count for each of them."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_tokens_per_second(self) -> float:
        """Return the rate of the tokens after the first, which the prefill yields."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Generation(str):
    """The generated text: a `str` that also knows how it came about.

    ids            generated token ids, a final stop id included
    finish_reason  "stop" (stop id or stop string), "length" (max_new_tokens), "context" (no room left)
                   or "cancelled" (the stream was closed)
    stop           the stop id or stop string that ended it, else None; it is not part of the text
    seed           the seed of this row, also where none was given
    timings        tokens and seconds
    """

    ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: int | str | None
    seed: int
    timings: Timings

    @property
    def text(self) -> str:
        """Return the text as a plain `str`."""
        return str.__str__(self)


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Everything that decides a generation but its prompts."""

    sampling: SamplingOptions
    max_new_tokens: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    seed: int


def resolve_options(
    defaults: Defaults,
    vocab: int,
    *,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_ids: Sequence[int] | None = None,
    **sampling: Any,
) -> GenerationOptions:
    """Fill what the caller left open (None) from the artifact's defaults.

    Sampling happens if `do_sample` says so; if it is None, when the caller gave any of temperature, top_k,
    top_p and min_p, else as the artifact's defaults say. Raises OptionError.
    """
    shaping = ("temperature", "top_k", "top_p", "min_p")
    stored = (*shaping, "repetition_penalty", "presence_penalty")
    known = (*stored, "frequency_penalty", "logit_bias")
    given = {name: value for name, value in sampling.items() if value is not None}
    for name in given.keys() - set(known):
        raise OptionError("unknown option", where=name, expected=", ".join(known))
    _check_biased_tokens(given.get("logit_bias"), vocab)
    if do_sample is not None:
        do_sample = arguments.flag("do_sample", do_sample)
    else:
        do_sample = defaults.do_sample or any(name in given for name in shaping)
    values = {name: getattr(defaults, name) for name in stored} | given
    if not do_sample:
        values["temperature"] = 0.0
    seed = secrets.randbits(63) if seed is None else arguments.integer("seed", seed, 0, MAX_SEED)
    return GenerationOptions(
        SamplingOptions(**values),
        _token_limit(max_new_tokens),
        check_stops(stop),
        frozenset(defaults.stop_ids) if stop_ids is None else _check_stop_ids(stop_ids, vocab),
        seed,
    )


def _check_biased_tokens(bias: Any, vocab: int) -> None:
    """Raise OptionError for the bias of a token that the model lacks."""
    if isinstance(bias, Mapping):
        for token in cast(Mapping[Any, Any], bias):
            arguments.integer("logit_bias", token, 0, vocab - 1)


def _token_limit(asked: int | None) -> int:
    if asked is None:
        return DEFAULT_MAX_NEW_TOKENS
    expected = f"1 or more, or {UNLIMITED}: until the context is full"
    limit = arguments.integer("max_new_tokens", asked, UNLIMITED, expected=expected)
    if limit == 0:
        raise OptionError("value is not allowed", where="max_new_tokens", expected=expected, got=0)
    return sys.maxsize if limit == UNLIMITED else limit


def _check_stop_ids(stop_ids: Sequence[int], vocab: int) -> frozenset[int]:
    listed = arguments.sequence("stop_ids", stop_ids, "a list of token ids")
    return frozenset(arguments.integer("stop_ids", token, 0, vocab - 1) for token in listed)


class Row:
    """One prompt on its way: its session, what was sampled, and why it ended.

    matcher     the structure that its tokens follow, if any
    """

    matcher: Matcher | None = None

    def __init__(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        seed: int,
        tokenizer: Tokenizer | None,
        session: Session | None = None,
    ) -> None:
        """Prepare a row; with a `session` it continues there, and leaves it open."""
        self.prompt = prompt
        self.session = session
        self._keeps_session = session is not None
        self._lease: Lease | None = None
        self.finish_reason: FinishReason | None = None
        self._options = options
        self._seed = seed
        self._sampler = Sampler(options.sampling, seed, token_ids(prompt))
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._scanner = StopScanner(options.stop)
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self.stop: int | str | None = None
        self._prefill_seconds = 0.0
        self._first_at = self._last_at = 0.0

    @property
    def last_token(self) -> int:
        """Return the token that the next step appends."""
        return self._ids[-1]

    @property
    def new_tokens(self) -> int:
        """Return how many tokens have been generated."""
        return len(self._ids)

    def start(self, place: Session | Lease) -> str:
        """Prefill the prompt into the row's session and sample the first token; return its text."""
        begin = time.perf_counter()
        if isinstance(place, Lease):
            self._lease, self.session = place, place.session
            logits = place.fill()
        else:
            self.session = place
            logits = place.prefill(self.prompt)
        self._prefill_seconds = time.perf_counter() - begin
        self._first_at = time.perf_counter()
        return self.accept(logits)

    def accept(self, logits: Logits, mask: Mask | None = None) -> str:
        """Sample a token that the mask, or else the structure, allows; return the text that is certain now.

        Sets `finish_reason` at the end.
        """
        assert self.session is not None
        if self.matcher is not None:
            mask = self.matcher.mask()
        token = self._sampler.sample(logits, mask)
        if self.matcher is not None:
            self.matcher.accept(token)
        self._ids.append(token)
        self._last_at = time.perf_counter()
        if token in self._options.stop_ids:
            self.stop, self.finish_reason = token, "stop"
            return self._keep(self.flush())
        piece = self._scanner.push(self._stream.push(token) if self._stream else "")
        if self._scanner.found is not None:
            self.stop, self.finish_reason = self._scanner.found, "stop"
        elif len(self._ids) >= self._options.max_new_tokens:
            self.finish_reason = "length"
        elif self.session.length >= self.session.context:
            self.finish_reason = "context"
        if self.finish_reason in ("length", "context"):
            piece += self.flush()
        return self._keep(piece)

    def end(self) -> None:
        """Give the session back; one that is kept gets the last token, which no step has appended.

        A row that has not ended is cancelled. May be called again.
        """
        self.finish_reason = self.finish_reason or "cancelled"
        session, self.session = self.session, None
        if session is None:
            return
        if self._lease is not None:
            self._lease.end()
        elif not self._keeps_session:
            session.close()
        elif self._ids and session.is_usable and session.length < session.context:
            session.append_at_last(self.last_token)

    def abandon(self) -> None:
        """End the row after an error, at which nobody knows what its session holds."""
        self.finish_reason = self.finish_reason or "cancelled"
        if self.session is not None and self._lease is not None:
            self._lease.end()  # it is not kept if it was in the midst of a step
        elif self.session is not None and not self._keeps_session:
            self.session.close()
        self.session = None

    def result(self) -> Generation:
        """Return what has been generated."""
        made = Generation("".join(self._pieces))
        made.ids = tuple(self._ids)
        made.finish_reason = self.finish_reason or "cancelled"
        made.stop = self.stop
        made.seed = self._seed
        made.timings = Timings(
            prompt_tokens=len(self.prompt),
            new_tokens=len(self._ids),
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._last_at - self._first_at,
        )
        return made

    def flush(self) -> str:
        """Return the text still held back; a stop string may yet complete in it."""
        text = self._scanner.push(self._stream.finish() if self._stream else "")
        if self._scanner.found is None:
            return text + self._scanner.finish()
        self.stop, self.finish_reason = self._scanner.found, "stop"
        return text

    def _keep(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece


class Stream(Iterator[Any]):
    """Yield text as it is generated: `str` for one prompt, (index, `str`) for a list of prompts.

    `result` (or `results`) holds what was generated so far. `close`, or dropping the stream, cancels: the
    sessions are given back at once. For one thread at a time.
    """

    def __init__(
        self, rows: list[Row], pieces: Generator[tuple[int, str]], is_single: bool
    ) -> None:
        self._rows, self._pieces, self._is_single = rows, pieces, is_single
        self._owner = threading.Lock()

    def __next__(self) -> Any:
        with self._owned():
            index, piece = next(self._pieces)
        return piece if self._is_single else (index, piece)

    def close(self) -> None:
        """Stop generating. The results keep the text so far; a session that was given holds all of it."""
        with self._owned():
            self._pieces.close()

    @property
    def results(self) -> list[Generation]:
        """Return the generation of every prompt, in order."""
        return [row.result() for row in self._rows]

    @property
    def result(self) -> Generation:
        """Return the generation of the only prompt, or of the first."""
        return self._rows[0].result()

    @contextmanager
    def _owned(self) -> Generator[None]:
        if not self._owner.acquire(blocking=False):
            raise OptionError("the stream is in use by another thread")
        try:
            yield
        finally:
            self._owner.release()


def run_rows(
    rows: Sequence[Row], batch: int, open_session: Callable[[Prompt], Session | Lease]
) -> Generator[tuple[int, str]]:
    """Generate all rows, up to `batch` at once; yield (row index, piece of text) as it comes.

    `open_session` gets a row's prompt. Raises what a step raises; sessions are closed in
    any case.
    """
    waiting = deque(enumerate(rows))
    active: list[tuple[int, Row]] = []
    try:
        while waiting or active:
            while waiting and len(active) < batch:
                index, row = waiting[0]
                try:
                    session = row.session or open_session(row.prompt)
                except MemoryRefused:
                    if not active:
                        raise
                    break  # a row that ends will make room
                waiting.popleft()
                active.append((index, row))
                yield from _piece(index, row.start(session))
                active = _drop_finished(active)
            if active:
                yield from _step(active)
                active = _drop_finished(active)
    except GeneratorExit:  # the consumer has seen enough
        for row in rows:
            row.end()
        raise
    finally:
        for row in rows:
            row.abandon()


def _step(active: list[tuple[int, Row]]) -> Iterator[tuple[int, str]]:
    sessions = [row.session for _, row in active if row.session is not None]
    logits = Session.decode_together(sessions, [row.last_token for _, row in active])
    # All rows sample before any text is handed out, so that a consumer who stops sees a whole step.
    pieces = [(index, row.accept(logits[at])) for at, (index, row) in enumerate(active)]
    for index, piece in pieces:
        yield from _piece(index, piece)


def _piece(index: int, piece: str) -> Iterator[tuple[int, str]]:
    if piece:
        yield index, piece


def _drop_finished(active: list[tuple[int, Row]]) -> list[tuple[int, Row]]:
    for _, row in active:
        if row.finish_reason is not None:
            row.end()
    return [(index, row) for index, row in active if row.finish_reason is None]
