"""One row that runs: its session and sampler, and the events that its request is owed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from q35c.errors import ExecutionError, Q35CError
from q35c.runtime.device import Logits
from q35c.runtime.generate import FinishReason, Row
from q35c.runtime.lease import SLICE, Lease
from q35c.runtime.multimodal import token_ids
from q35c.runtime.sampling import log_shares
from q35c.runtime.session import Session
from q35c.runtime.tokenizer import Tokenizer
from q35c.serve.request import Event, Failed, Finished, Scored, Started, Token, Usage
from q35c.serve.schedule import Job


class Seat:
    """A request that was admitted. Lives on the engine thread."""

    def __init__(self, job: Job, lease: Lease, tokenizer: Tokenizer | None) -> None:
        """Sit down with a session that holds a part of the prompt. Raises what a constraint raises."""
        request = job.request
        self.job, self.request, self.lease = job, request, lease
        self.events: list[Event] = [Started(lease.cached_tokens)]
        self.is_prefilling, self.is_over, self.has_failed = True, False, False
        self.stepped_at = 0  # the number of its last step among those of all rows
        self._row = Row(request.prompt, request.options, request.options.seed, tokenizer)
        self._row.session = lease.session
        self._matcher: Any = None if request.constraint is None else request.constraint.matcher()
        self._scored: list[Token] = []
        self._last: Logits | None = None  # of the prompt, while it is scored
        self.made = 0
        self._admitted_at, self._first_at = time.monotonic(), 0.0
        self.grammar_seconds = 0.0

    @property
    def session(self) -> Session:
        """Return the row's session."""
        return self.lease.session

    @property
    def last_token(self) -> int:
        """Return the token that the next step appends."""
        return self._row.last_token

    def advance(self) -> Logits | None:
        """Compute one slice of the prompt; return the logits after its last token, None before."""
        return self._score() if self.request.is_scoring else self.lease.advance()

    def begin(self, logits: Logits) -> None:
        """Sample the first token, by the logits after the prompt."""
        self.is_prefilling = False
        self._first_at = time.monotonic()
        if self.request.is_scoring:
            self.events.append(Scored(tuple(self._scored)))
        if self.request.options.max_new_tokens == 0:
            self.finish("length")
            return
        self.accept(logits)

    def accept(self, logits: Logits) -> None:
        """Sample a token. Raises ExecutionError for broken logits, or what the constraint raises."""
        row = self._row
        mask = None
        begin = time.perf_counter()
        if self._matcher is not None:
            mask = self._matcher.mask()
        middle = time.perf_counter()
        text = row.accept(logits, mask)
        token = row.last_token
        end = time.perf_counter()
        if self._matcher is not None:
            self._matcher.accept(token)
            self.grammar_seconds += middle - begin + time.perf_counter() - end
        self.made += 1
        logprob, top = None, ()
        if self.request.logprobs is not None:
            logprob, top = log_shares(logits, token, self.request.logprobs)
        is_stop_id = row.finish_reason == "stop" and type(row.stop) is int
        self.events.append(Token(token, "" if is_stop_id else text, logprob, top))
        if row.finish_reason is not None:
            self.finish(row.finish_reason, text if is_stop_id else "")

    def finish(self, reason: FinishReason, text: str = "") -> None:
        """End the row; its session is the lease's."""
        stop = self._row.stop if reason == "stop" else None
        self.events.append(Finished(reason, self.usage(), stop, text))
        self.is_over = True

    def cancel(self) -> None:
        """End the row before its time, with the text that was still held back."""
        self.finish("cancelled", self._row.flush())

    def fail(self, error: BaseException) -> None:
        """End the row by an error of its own, or of a step that it was part of."""
        self.events.append(Failed(typed(error)))
        self.is_over = self.has_failed = True

    def usage(self) -> Usage:
        """Return what the row has taken so far."""
        now = time.monotonic()
        first = self._first_at or now
        return Usage(
            prompt_tokens=len(self.request.ids),
            cached_tokens=self.lease.cached_tokens,
            new_tokens=self.made,
            queue_seconds=self._admitted_at - self.job.at,
            prefill_seconds=first - self._admitted_at,
            decode_seconds=now - first,
        )

    def _score(self) -> Logits | None:
        """Compute one slice of the prompt with the logits of all its tokens."""
        ids, session = token_ids(self._row.prompt), self.session
        start = session.length
        logits = session.score(ids[start : start + SLICE])
        count = self.request.logprobs or 0
        if self._last is None:
            self._scored.append(Token(ids[0], ""))
            before = logits
        else:
            before = np.concatenate([self._last[None], logits])
            start -= 1
        for row, token in zip(before, ids[start + 1 : session.length], strict=False):
            self._scored.append(Token(token, "", *log_shares(row, token, count)))
        self._last = logits[-1]
        return self._last if session.length == len(ids) else None


def typed(error: BaseException) -> Q35CError:
    """Return an error as one of q35c's own."""
    if isinstance(error, Q35CError):
        return error
    return ExecutionError(f"the engine failed: {type(error).__name__}: {error}"[:500])
