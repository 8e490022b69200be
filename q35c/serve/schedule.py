"""Who is next: clients in turn by the tokens they were given, and as much prefill as the running rows can stand.

No sessions here, and no clock but what it is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from q35c.runtime.lease import SLICE
from q35c.serve.request import Post, Request

MOST_SLICES = 4  # of one turn; whoever cancels waits for them at most
_SMOOTHING = 0.2  # of a new measurement in the running mean
_DRIFT = 1.001  # by which the best step is forgotten, as steps grow slower with the context


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A request that waits, since `at` on the monotonic clock."""

    number: int
    request: Request
    post: Post
    at: float


class Shares:
    """The tokens that each client was given. Who has the least is next.

    A client that comes, or comes back, begins with the least of those who are there: nobody saves up a claim.
    """

    def __init__(self) -> None:
        self._given: dict[str, float] = {}
        self._open: Counter[str] = Counter()

    def enter(self, client: str) -> None:
        """Count a request of a client."""
        if client not in self._given:
            self._given[client] = min(self._given.values(), default=0.0)
        self._open[client] += 1

    def leave(self, client: str) -> None:
        """End a request of a client; nothing is kept of one that has none."""
        self._open[client] -= 1
        if self._open[client] == 0:
            del self._open[client], self._given[client]

    def charge(self, client: str, tokens: int) -> None:
        """Note that a client was given tokens."""
        self._given[client] += tokens

    def __getitem__(self, client: str) -> float:
        return self._given[client]

    def __len__(self) -> int:
        return len(self._given)


class Queue:
    """Requests that wait for a row."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._jobs: dict[int, Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def all(self) -> list[Job]:
        """Return all requests, the oldest first."""
        return list(self._jobs.values())

    def add(self, job: Job) -> None:
        """Add a request behind all others of its client."""
        self._jobs[job.number] = job

    def take(self, number: int) -> Job | None:
        """Remove a request; return it if it was there."""
        return self._jobs.pop(number, None)

    def next(self, is_allowed: Callable[[Job], bool]) -> Job | None:
        """Return the request that comes next of those allowed: by priority, its client's share, and age."""
        allowed = filter(is_allowed, self._jobs.values())
        return min(allowed, key=self._rank, default=None)

    def _rank(self, job: Job) -> tuple[int, float, int]:
        return job.request.priority, self._shares[job.request.client], job.number


class Ages:
    """Which prompt is computed next: the shortest, unless others have gone before it for long.

    Each token that others were given while a prompt waits counts as one of its own: a prompt of 16,000 tokens lets shorter
    ones pass for at most as many tokens.
    """

    def __init__(self) -> None:
        self._given = 0
        self._entered: dict[int, int] = {}

    def enter(self, number: int) -> None:
        """Let a prompt wait from now on."""
        self._entered[number] = self._given

    def leave(self, number: int) -> None:
        """End a prompt's wait."""
        del self._entered[number]

    def note(self, number: int, tokens: int) -> None:
        """Count tokens that were computed of a prompt; they make no prompt older than its own part of them."""
        self._given += tokens
        self._entered[number] += tokens

    def rank(self, number: int, remaining: int) -> int:
        """Return the length that decides: least first."""
        return remaining - (self._given - self._entered[number])


class Pace:
    """How long steps and slices take, and how many slices may follow a step."""

    def __init__(self, max_stall: float) -> None:
        """`max_stall` is in seconds: what a step and the slices behind it should take together."""
        self._max_stall = max_stall
        self._slice_seconds: float | None = None
        self._best: dict[int, float] = {}  # seconds of a step, by its rows
        # How much longer steps take than the best with as many rows; 1 is none.
        self.stall_ratio = 0.0

    def note_step(self, rows: int, seconds: float) -> None:
        """Note a step's time."""
        best = self._best[rows] = min(seconds, self._best.get(rows, seconds) * _DRIFT)
        ratio = seconds / best if best > 0.0 else 1.0
        self.stall_ratio = _mean(self.stall_ratio or None, ratio)

    def note_slice(self, tokens: int, seconds: float) -> None:
        """Note the time of a slice; the rest of a prompt says too little of how long a whole one takes."""
        if tokens >= SLICE:
            self._slice_seconds = _mean(self._slice_seconds, seconds)

    @property
    def slice_seconds(self) -> float:
        """Return how long a slice takes, 0 before the first."""
        return self._slice_seconds or 0.0

    def slices(self, step_seconds: float | None) -> int:
        """Return how many slices to compute after a step that took so long; None: nobody waits for a step.

        At least one, so that prompts get on beside the longest steps.
        """
        if step_seconds is None:
            return MOST_SLICES
        if not self._slice_seconds:
            return 1
        left = (self._max_stall - step_seconds) / self._slice_seconds
        return int(min(max(left, 1), MOST_SLICES))


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _SMOOTHING * (value - before)
