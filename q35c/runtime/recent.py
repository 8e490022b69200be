"""Which prompts came lately: where a new one leaves their way, and why nothing is kept of what they share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from q35c.runtime.prefix_tree import RUN, TokenIds

MissReason = Literal["new", "diverged", "unmarked", "evicted", "salt"]
MISS_REASONS: tuple[MissReason, ...] = ("new", "diverged", "unmarked", "evicted", "salt")
MOST_PROMPTS, MOST_BYTES = 256, 16 << 20


_TEXTS: dict[MissReason, str] = {
    "new": "no prompt of late begins like it",
    "diverged": "it leaves an earlier prompt's way at token {}",
    "unmarked": "it leaves an earlier prompt's way at token {}, with no checkpoint there yet",
    "evicted": "an earlier prompt agrees up to token {}, but was evicted",
    "salt": "an earlier prompt begins like it, but has another salt",
}


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a prompt was not found as far as it might have been.

    new        no prompt of late begins like it
    diverged   one does, up to here, and that much was found
    unmarked   one does, but had no checkpoint here; the new one gets it
    evicted    one does, and its checkpoint is gone
    salt       one does, of another salt
    """

    reason: MissReason
    agreed_tokens: int

    def describe(self, tokens: int, found: int) -> str:
        """Return a line for a log, of a prompt of so many tokens of which `found` were kept."""
        return f"{found} of {tokens} tokens found: {_TEXTS[self.reason].format(self.agreed_tokens)}"


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    salt: str
    ids: TokenIds
    points: tuple[int, ...]


class RecentPrompts:
    """The last prompts, in order."""

    def __init__(self) -> None:
        self._prompts: deque[_Prompt] = deque()
        self._bytes = 0

    def add(self, ids: TokenIds, salt: str, points: tuple[int, ...]) -> None:
        """Remember a prompt and where checkpoints were planned in it."""
        self._prompts.append(_Prompt(salt, ids, points))
        self._bytes += ids.nbytes
        while len(self._prompts) > MOST_PROMPTS or self._bytes > MOST_BYTES:
            self._bytes -= self._prompts.popleft().ids.nbytes

    def explain(self, ids: TokenIds, salt: str, found: int) -> Miss | None:
        """Return why only `found` tokens of a prompt are there; None if nothing more could be expected."""
        best, agreed = None, 0
        for prompt in self._of(salt):
            count = agreement(prompt.ids, ids)
            if count >= agreed:
                best, agreed = prompt, count
        if best is None or agreed < RUN:
            is_elsewhere = any(
                prompt.salt != salt and agreement(prompt.ids, ids) >= RUN
                for prompt in self._prompts
            )
            return Miss("salt" if is_elsewhere else "new", agreed)
        border = min(agreed, len(ids) - 1) // RUN * RUN
        if any(found < point <= border for point in best.points):
            return Miss("evicted", agreed)
        if len(best.ids) - agreed < RUN:  # it goes on where the other one ended
            return None
        return Miss("unmarked" if border > found else "diverged", agreed)

    def _of(self, salt: str) -> Iterator[_Prompt]:
        return (prompt for prompt in self._prompts if prompt.salt == salt)


def agreement(first: TokenIds, second: TokenIds) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    count = min(len(first), len(second))
    if count > RUN and not np.array_equal(first[:RUN], second[:RUN]):
        count = RUN
    differs = first[:count] != second[:count]
    at = int(differs.argmax()) if count else 0
    return at if count and differs[at] else count
