"""Compute for all requests in turns: one step of the rows that generate, then some slices of prompts.

Which calls compute a prompt follows from the prompt alone (`q35c.runtime.prefix`), so neither load nor what is kept changes a
bit. A fault belongs to whom it concerns: of a sampler or a grammar to its row, of a step to the rows of that step.

For one thread, which owns the sessions. It holds no locks, and knows other threads by two functions that it is given.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from q35c.errors import MemoryRefused
from q35c.runtime.device import Logits
from q35c.runtime.lease import Branch, Lease
from q35c.runtime.memory import state_bytes
from q35c.runtime.model import Model
from q35c.runtime.prefix import PrefixCache
from q35c.runtime.saved import Snapshot
from q35c.runtime.session import Session
from q35c.runtime.tokenizer import Tokenizer
from q35c.serve.request import Event, Failed, Finished, Request, Usage
from q35c.serve.schedule import Ages, Job, Pace, Queue, Shares
from q35c.serve.seat import Seat, typed

log = logging.getLogger("q35c.serve")
RESERVED_TOKENS = 1024  # that a row may generate before it asks for more memory
PREFILLING_SEATS = 4  # prompts that are computed by turns; more would only hold memory


class Turns:
    """The requests that wait, the seats of those that were admitted, and what a turn does for them."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        cache: PrefixCache,
        pace: Pace,
        batch: int,
        *,
        on_seat: Callable[[Job], None],
        on_end: Callable[[Job], None],
    ) -> None:
        """`on_seat` and `on_end` are told of each request once, when it is admitted and after its last event."""
        self.queue_shares = Shares()
        self.queue = Queue(self.queue_shares)
        self.seats: dict[int, Seat] = {}
        self.counts: Counter[str] = Counter()
        self.rows: Counter[int] = Counter()
        self.grammar_seconds = 0.0
        self._model, self._tokenizer, self._cache, self._pace = model, tokenizer, cache, pace
        self._batch = batch
        self._on_seat, self._on_end = on_seat, on_end
        self._ages = Ages()
        self._steps = 0  # of all rows

    @property
    def is_idle(self) -> bool:
        """Say whether there is nothing to compute."""
        return not self.seats and not len(self.queue)

    @property
    def state_bytes(self) -> int:
        """Return the memory of the states of all seats; from any thread."""
        sessions = [seat.session for seat in list(self.seats.values())]
        return sum(state_bytes(self._model.manifest, session.high_water) for session in sessions)

    def add(self, job: Job) -> None:
        """Let a request wait for a seat, unless it is one for idle times and others are there."""
        self.queue_shares.enter(job.request.client)
        if not job.request.is_idle:
            self.drop_idle()
        elif not self.is_idle:
            self.turn_away(job, None)
            return
        self.queue.add(job)

    def drop_idle(self) -> None:
        """End what is computed for want of other work; what was computed of it is kept."""
        for job in self.queue.all():
            if job.request.is_idle:
                self.turn_away(job, None)
        for seat in self.seats.values():
            if seat.request.is_idle and not seat.is_over:
                seat.cancel()

    def cancel(self, number: int) -> None:
        """End a request, wherever it is; no error if it has ended."""
        if (job := self.queue.take(number)) is not None:
            self.turn_away(job, None)
        elif (seat := self.seats.get(number)) is not None and not seat.is_over:
            seat.cancel()

    def turn_away(self, job: Job, error: BaseException | None) -> None:
        """End a request that has no seat, by an error or as cancelled."""
        self.queue.take(job.number)
        usage = Usage(len(job.request.ids), queue_seconds=time.monotonic() - job.at)
        event = Finished("cancelled", usage) if error is None else Failed(typed(error))
        self._post(job, [event])
        self._end(job)

    def take_turn(self, is_wanted: Callable[[], bool]) -> None:
        """Compute a turn; it ends early between two slices if `is_wanted` says that somebody wants something."""
        try:
            self._admit()
            self._prefill(self._step(), is_wanted)
        except Exception as error:
            log.exception("a turn failed: what is running is given up")
            self._fail_seats(error)
        self.settle()

    def abandon(self, error: BaseException) -> None:
        """End everything by an error."""
        self._fail_seats(error)
        self.settle()
        for job in self.queue.all():
            self.turn_away(job, error)

    def _fail_seats(self, error: BaseException) -> None:
        for seat in self.seats.values():
            if not seat.is_over:
                seat.fail(error)

    def settle(self) -> None:
        """Hand out events, all of a row at once, and clear the seats of rows that are over."""
        for seat in list(self.seats.values()):
            events, seat.events = seat.events, []
            if seat.is_over:
                # First: when a client hears of the end, its next turn finds all that is kept.
                self._leave(seat)
            if events and not self._post(seat.job, events) and not seat.is_over:
                seat.is_over = True  # nobody is there who could be told
                self._leave(seat)
            if seat.is_over:
                self._end(seat.job)

    def _leave(self, seat: Seat) -> None:
        del self.seats[seat.job.number]
        self._ages.leave(seat.job.number)
        self.grammar_seconds += seat.grammar_seconds
        try:
            seat.lease.end(keeps=not seat.has_failed)
        except Exception:
            log.exception("a session could not be kept")
            seat.session.close()

    def _post(self, job: Job, events: Sequence[Event]) -> bool:
        try:
            job.post(job.request, list(events))
        except Exception:
            log.exception("events could not be posted: their request is given up")
            return False
        return True

    def _end(self, job: Job) -> None:
        self.queue_shares.leave(job.request.client)
        self._on_end(job)

    def _admit(self) -> None:
        """Give seats to waiting requests while there are rows and memory."""
        while (job := self.queue.next(self._may_sit)) is not None:
            try:
                self._sit(job, self._open(job.request))
            except MemoryRefused as error:
                if self.seats:
                    return  # a row that ends will make room
                self.turn_away(job, error)
            except Exception as error:  # such as a grammar's
                self.turn_away(job, error)

    def _may_sit(self, job: Job) -> bool:
        """Say whether a request may have a seat now.

        Beyond the rows of a step there are half as many seats again for clients that have none: they need not wait until
        another client's long answers end, as all rows then take turns.
        """
        seats = self.seats.values()
        prefilling = [seat for seat in seats if seat.is_prefilling and not seat.is_over]
        if any(_are_alike(seat.request, job.request) for seat in prefilling):
            return False  # it will be forked
        is_new_client = all(seat.request.client != job.request.client for seat in seats)
        spare = -(-self._batch // 2) if is_new_client else 0
        is_free = len(self.seats) < self._batch + spare
        return is_free and len(prefilling) < PREFILLING_SEATS + spare

    def _open(self, request: Request) -> Lease:
        """Return a session with what is kept of the prompt. Raises MemoryRefused."""
        context = min(self._limit(request), len(request.ids) + RESERVED_TOKENS)
        if not request.is_scoring:
            return self._cache.open(request.ids, context, request.salt)
        session = self._cache.with_room(lambda: self._model.session(context))
        return self._plain(session, request)  # it needs the logits of all tokens

    def _sit(self, job: Job, lease: Lease) -> Seat:
        try:
            seat = Seat(job, lease, self._tokenizer)
        except BaseException:
            lease.end()  # the fault is not the session's
            raise
        self.queue.take(job.number)
        self.seats[job.number] = seat
        self._ages.enter(job.number)
        if not job.request.is_idle:
            self.counts["prompt_tokens"] += len(job.request.ids)
            self.counts["cached_tokens"] += lease.cached_tokens
        if lease.miss is not None:
            log.info(
                "request %d: %s",
                job.number,
                lease.miss.describe(len(job.request.ids), lease.cached_tokens),
            )
        self._on_seat(job)
        return seat

    def _limit(self, request: Request) -> int:
        return min(self._model.context, len(request.ids) + request.options.max_new_tokens)

    def _step(self) -> float | None:
        """Make one step of the rows that generate; return its seconds, None if there was none."""
        rows = [seat for seat in self.seats.values() if not (seat.is_prefilling or seat.is_over)]
        rows = sorted(rows, key=lambda seat: seat.stepped_at)[: self._batch]
        rows = [seat for seat in rows if self._has_room(seat)]
        if not rows:
            return None
        begin = time.perf_counter()
        try:
            sessions = [seat.session for seat in rows]
            logits = Session.decode_together(sessions, [seat.last_token for seat in rows])
        except Exception as error:
            log.exception("a step failed: its rows are given up")
            for seat in rows:
                seat.fail(error)
            return None
        for seat, row in zip(rows, logits, strict=True):
            self._steps += 1
            seat.stepped_at = self._steps
            self._sample(seat, seat.accept, row)
        seconds = time.perf_counter() - begin
        self._pace.note_step(len(rows), seconds)
        self.counts["steps"] += 1
        self.rows[len(rows)] += 1
        return seconds

    def _has_room(self, seat: Seat) -> bool:
        """Keep memory for a row's next tokens; end it where there is none."""
        session, limit = seat.session, self._limit(seat.request)
        if session.length + 2 > session.context and session.context < limit:
            try:
                more = min(limit, session.context + RESERVED_TOKENS)
                self._cache.with_room(lambda: session.resize(more))
            except MemoryRefused:
                seat.finish("context")
                return False
        return True

    def _sample(self, seat: Seat, sample: Callable[[Logits], None], logits: Logits) -> None:
        """Let a row choose a token; a fault in it is its own."""
        before = seat.made
        try:
            sample(logits)
        except Exception as error:
            log.exception("a row failed")
            seat.fail(error)
        self.counts["generated_tokens"] += seat.made - before
        self.queue_shares.charge(seat.request.client, seat.made - before)

    def _prefill(self, step_seconds: float | None, is_wanted: Callable[[], bool]) -> None:
        """Compute slices of prompts, as many as the rows can stand."""
        for _ in range(self._pace.slices(step_seconds)):
            seats = [s for s in self.seats.values() if s.is_prefilling and not s.is_over]
            if not seats:
                return
            self._compute_slice(min(seats, key=self._rank))
            if is_wanted():
                return

    def _rank(self, seat: Seat) -> tuple[int, float, int, int]:
        """Order prompts: by priority, the client's share, then the shortest that is not old."""
        number, request = seat.job.number, seat.request
        age = self._ages.rank(number, len(request.ids) - seat.session.length)
        return request.priority, self.queue_shares[request.client], age, number

    def _compute_slice(self, seat: Seat) -> None:
        before, begin = seat.session.length, time.perf_counter()
        try:
            logits = seat.advance()
        except Exception as error:
            log.exception("a slice of a prompt failed: its row is given up")
            seat.fail(error)
            return
        tokens = seat.session.length - before
        self._pace.note_slice(tokens, time.perf_counter() - begin)
        self.counts["prefill_slices"] += 1
        self._ages.note(seat.job.number, tokens)
        self.queue_shares.charge(seat.request.client, tokens)
        if logits is not None:
            self._begin(seat, logits)

    def _begin(self, seat: Seat, logits: Logits) -> None:
        """Let a row sample its first token, and so all that wait for the same prompt while there are rows and memory."""
        self._sample(seat, seat.begin, logits)
        alike = [job for job in self.queue.all() if _are_alike(seat.request, job.request)]
        alike = alike[: max(0, self._batch - len(self.seats))]
        if not alike:
            return
        snapshot = seat.session.snapshot()
        for job in alike:
            try:
                fork = self._sit(job, self._fork(job.request, snapshot, seat.lease.cached_tokens))
            except MemoryRefused:
                return  # they will go the ordinary way
            except Exception as error:
                self.turn_away(job, error)
                continue
            self._sample(fork, fork.begin, logits)

    def _fork(self, request: Request, snapshot: Snapshot, cached_tokens: int) -> Lease:
        context = min(self._limit(request), len(request.ids) + RESERVED_TOKENS)
        session = self._model.session(context)
        session.restore(snapshot)
        lease = self._plain(session, request)
        lease.cached_tokens = cached_tokens
        return lease

    @staticmethod
    def _plain(session: Session, request: Request) -> Lease:
        return Lease(Branch(session, request.salt), request.ids)


def _are_alike(first: Request, second: Request) -> bool:
    """Say whether two requests have the same prompt by their own words, which are checked."""
    is_plain = not (first.is_scoring or second.is_scoring)
    is_group = first.group == second.group != "" and first.salt == second.salt
    return is_plain and is_group and first.ids == second.ids
