"""The engine: one thread that owns all sessions, and what other threads may ask of it.

What it computes, and in which order, is in `turns`. Everything that threads share is under one lock, which nobody holds
while something is computed or posted.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

from q35c import arguments
from q35c.errors import OptionError, Overloaded, Q35CError, TokenizerError, Unavailable
from q35c.runtime.lease import SLICE
from q35c.runtime.model import Model
from q35c.runtime.multimodal import MultimodalPrompt, check_prompt
from q35c.runtime.recent import MISS_REASONS
from q35c.serve.request import Post, Request, Statistics, Structure, Ticket
from q35c.serve.schedule import Job, Pace
from q35c.serve.turns import Turns

log = logging.getLogger("q35c.serve")
MAX_QUEUE_TOKENS = 1 << 20
_LEAST_RETRY_SECONDS = 1.0


class Engine:
    """Serve requests of many threads with one model, as `q35c.serve.request.Serving`."""

    def __init__(
        self,
        model: Model,
        *,
        batch: int | None = None,
        max_queue: int = 64,
        max_queue_tokens: int = MAX_QUEUE_TOKENS,
        max_stall: float = 0.2,
        cache_bytes: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Start the thread. The model stays its owner's, who closes it after the engine.

        batch        rows of one step, at most and by default the model's
        max_queue    requests that may wait, of at most `max_queue_tokens` in all
        max_stall    seconds that a step and the slices of prompts behind it should take together
        cache_bytes  memory for what is kept of prompts; 0: nothing
        cache_dir    where that is written at the end, and read from at the beginning

        Raises OptionError.
        """
        self._model = arguments.instance("model", model, Model)
        self._batch = arguments.integer(
            "batch", model.batch if batch is None else batch, 1, model.batch
        )
        self._max_queue = arguments.integer("max_queue", max_queue, 1, 1 << 20)
        self._max_queue_tokens = arguments.integer("max_queue_tokens", max_queue_tokens, 1, 1 << 40)
        self._pace = Pace(arguments.real("max_stall", max_stall, 0.001, 60.0))
        cache_bytes = arguments.integer("cache_bytes", cache_bytes, 0, 1 << 60)
        try:
            tokenizer, self._grammars = model.tokenizer, model.grammars
        except TokenizerError:
            tokenizer = self._grammars = None
        self._cache = model.cache(cache_bytes)
        self._cache.shares_lent = True
        self._cache_directory = (
            None if cache_dir is None else arguments.path("cache_dir", cache_dir)
        )
        if self._cache_directory is not None:
            self._cache.load(self._cache_directory)
        self._turns = Turns(
            model,
            tokenizer,
            self._cache,
            self._pace,
            self._batch,
            on_seat=self._on_seat,
            on_end=self._on_end,
        )
        # What other threads touch, under the lock.
        self._changed = threading.Condition()
        self._arrived: list[Job] = []
        self._cancelled: set[int] = set()
        self._waiting: dict[int, int] = {}  # number -> tokens, from submit to admission
        self._open: set[int] = set()  # numbers, from submit to the last event
        self._last_number = 0
        self._is_draining = self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="q35c-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, post: Post) -> Ticket:
        """Queue a request, from any thread; its events are posted from the engine's.

        Raises PromptError; OptionError for pictures in a prompt that is scored; Overloaded with the seconds after which to try again; Unavailable while the engine drains.
        """
        request = arguments.instance("request", request, Request)
        check_prompt(request.ids, self._model.manifest, self._model.context)
        if request.is_scoring and isinstance(request.ids, MultimodalPrompt):
            raise OptionError("a prompt with pictures is not scored", where="is_scoring")
        with self._changed:
            if self._is_draining or self._is_closing or not self._thread.is_alive():
                raise _draining()
            self._check_queue(len(request.ids))
            self._last_number += 1
            job = Job(self._last_number, request, post, time.monotonic())
            self._waiting[job.number] = len(request.ids)
            self._open.add(job.number)
            self._arrived.append(job)
            self._changed.notify_all()
        return Ticket(request, job.number)

    def cancel(self, ticket: Ticket) -> None:
        """End a request within a turn, from any thread; no error if it has ended."""
        number = arguments.instance("ticket", ticket, Ticket).number
        with self._changed:
            if number in self._open:
                self._cancelled.add(number)
                self._changed.notify_all()

    def compile(self, structure: Structure) -> Any:
        """Return the constraint of a structure, for `Request.constraint`. Raises OptionError that names what cannot be enforced."""
        structure = arguments.instance("structure", structure, Structure)
        if self._grammars is None:
            raise OptionError("structured answers need a tokenizer", where=structure.where)
        return self._grammars.compile(
            structure.kind,
            structure.value,
            where=structure.where,
            is_thinking=structure.is_thinking,
            is_parallel=structure.is_parallel,
            thinking_tokens=structure.thinking_tokens,
        )

    def drain(self, seconds: float) -> None:
        """Refuse new and waiting requests and let running ones end; cancel what has not ended after so many seconds."""
        seconds = arguments.real("seconds", seconds, 0.0, 1e6)
        with self._changed:
            self._is_draining = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._open, seconds):
                self._cancelled |= self._open
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._open)

    def close(self) -> None:
        """End the thread and give the sessions back; what is open ends as cancelled. May be called twice."""
        with self._changed:
            self._is_draining = self._is_closing = True
            self._cancelled |= self._open
            self._changed.notify_all()
        self._thread.join()

    def statistics(self) -> Statistics:
        """Return the numbers of this moment, from any thread."""
        with self._changed:
            waiting, tokens = len(self._waiting), sum(self._waiting.values())
        turns, counts = self._turns, self._turns.counts
        return Statistics(
            running=len(turns.seats),
            waiting=waiting,
            waiting_tokens=tokens,
            prompt_tokens=counts["prompt_tokens"],
            cached_tokens=counts["cached_tokens"],
            generated_tokens=counts["generated_tokens"],
            steps=counts["steps"],
            prefill_slices=counts["prefill_slices"],
            grammar_seconds=turns.grammar_seconds,
            step_stall_ratio=self._pace.stall_ratio,
            rows=dict(turns.rows),
            evictions=self._cache.evictions,
            misses={reason: self._cache.misses[reason] for reason in MISS_REASONS},
            state_bytes={
                "running": turns.state_bytes,
                "parked": self._cache.parked_bytes,
                "cached": self._cache.cached_bytes,
            },
        )

    def _check_queue(self, tokens: int) -> None:
        waiting_tokens = sum(self._waiting.values())
        if len(self._waiting) < self._max_queue and (
            not self._waiting or waiting_tokens + tokens <= self._max_queue_tokens
        ):
            return
        seconds = waiting_tokens / SLICE * self._pace.slice_seconds
        raise Overloaded(
            "too many requests wait",
            expected=f"at most {self._max_queue} requests of {self._max_queue_tokens} tokens in all",
            got=f"{len(self._waiting)} requests of {waiting_tokens} tokens",
            retry_after_seconds=max(_LEAST_RETRY_SECONDS, seconds),
        )

    # From here on everything runs on the engine's thread.

    def _run(self) -> None:
        turns = self._turns
        try:
            while self._take_commands():
                turns.settle()
                turns.take_turn(self._is_wanted)
            self._save_cache()
        except (
            BaseException
        ) as error:  # nobody else would hear of it, and clients would wait for ever
            log.exception("the engine ends")
            self._abandon(error)
        self._cache.close()

    def _abandon(self, error: BaseException) -> None:
        with self._changed:
            self._is_draining = self._is_closing = True
            arrived, self._arrived = self._arrived, []
        for job in arrived:
            self._turns.add(job)
        self._turns.abandon(error)

    def _save_cache(self) -> None:
        if self._cache_directory is not None:
            try:
                self._cache.save(self._cache_directory)
            except (Q35CError, OSError) as error:
                log.warning("what is kept of prompts could not be written: %s", error)

    def _take_commands(self) -> bool:
        """Take what other threads asked for, and wait while there is nothing to do. Say whether to go on."""
        turns = self._turns
        with self._changed:
            while turns.is_idle and not self._is_wanted():
                if self._is_closing:
                    return False
                self._changed.wait()
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, set()
            is_draining = self._is_draining
        for job in arrived:
            turns.add(job)
        for number in cancelled:
            turns.cancel(number)
        if is_draining:
            turns.drop_idle()
        now = time.monotonic()
        for job in turns.queue.all():
            deadline = job.request.deadline
            if is_draining:
                turns.turn_away(job, _draining())
            elif deadline is not None and deadline < now:
                turns.turn_away(job, None)
        return True

    def _is_wanted(self) -> bool:
        return bool(self._arrived or self._cancelled)

    def _on_seat(self, job: Job) -> None:
        with self._changed:
            self._waiting.pop(job.number, None)

    def _on_end(self, job: Job) -> None:
        with self._changed:
            self._waiting.pop(job.number, None)
            self._open.discard(job.number)
            self._cancelled.discard(job.number)
            self._changed.notify_all()


def _draining() -> Unavailable:
    return Unavailable("the server is shutting down")
