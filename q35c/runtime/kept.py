"""A session that is kept from prompt to prompt, as most prompts of a conversation begin like the one before.

It is only ever rewound to checkpoints on the grid, where a cut changes no bit. So an answer does not depend on what the
session held before: an earlier turn that is said again is bit for bit the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence

from q35c.layouts.blobs import GRID
from q35c.runtime.saved import Checkpoint
from q35c.runtime.session import Session

MOST_CHECKPOINTS = 4


class KeptSession:
    """One session for prompts that come one after another. For one thread at a time."""

    def __init__(self, open_session: Callable[[], Session]) -> None:
        self._open_session = open_session
        self._session: Session | None = None
        self._checkpoints: list[Checkpoint] = []

    def fill(self, prompt: Sequence[int], control: Collection[int]) -> tuple[Session, int]:
        """Return a session that holds a prompt but for its end, and how many tokens of it were there before.

        The prompts that follow are most like this one up to the first and the last of its turns, which begin with
        one of the `control` ids: there it will be possible to go on. Raises MemoryRefused, PromptError.
        """
        if self._session is None:
            self._session = self._open_session()
        session = self._session
        checkpoint = self._find(session, prompt)
        if checkpoint is not None:
            session.rewind(checkpoint)
        elif session.length or not session.is_usable:
            session.reset()
        cached = session.length
        self._checkpoints = [saved for saved in self._checkpoints if saved.length <= cached]
        for border in turn_borders(prompt, control):
            if border > session.length:
                session.extend(prompt[session.length : border])
                self._checkpoints.append(session.checkpoint())
        if len(self._checkpoints) > MOST_CHECKPOINTS:
            del self._checkpoints[1]  # the first one is the beginning of every prompt
        return session, cached

    def close(self) -> None:
        """Give the session back. May be called again."""
        if self._session is not None:
            self._session.close()
        self._session, self._checkpoints = None, []

    def _find(self, session: Session, prompt: Sequence[int]) -> Checkpoint | None:
        """Return the longest checkpoint that a prompt goes on from, None if there is none."""
        ids, held = array("i", prompt).tobytes(), session.ids.tobytes()
        fitting = [
            saved
            for saved in self._checkpoints
            if saved.length < len(prompt)
            and ids.startswith(saved.ids)
            and held.startswith(saved.ids)
        ]
        return max(fitting, key=lambda saved: saved.length, default=None)


def turn_borders(prompt: Sequence[int], control: Collection[int]) -> list[int]:
    """Return the places on the grid up to which later prompts are probably the same.

    They precede the second and the last turn; a turn begins with the control token that is last in the prompt.
    """
    last = next((token for token in reversed(prompt) if token in control), None)
    begins = [place for place, token in enumerate(prompt) if token == last]
    places = {*begins[1:2], *begins[-1:]}
    return sorted({place - place % GRID for place in places if place >= GRID})
