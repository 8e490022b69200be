"""Prompts on a grid: a session is filled with a prompt by calls that follow from the prompt alone.

A prompt is cut at the multiples of 64 below its last token, and what remains is a call of its own, whatever is kept of
earlier prompts and whatever else runs. A checkpoint is made at such a cut alone, of a state that no decoding step has touched;
so a session that goes on from there holds the same bits as one that began anew.

Checkpoints are made where the next prompt will probably leave this one's way: at the last message's beginning, as the
template rewrites what the model said; at the end of the first message, which is the same for many; and where a prompt was
seen to leave another's way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from q35c.runtime.device import Logits
from q35c.runtime.multimodal import PromptLike
from q35c.runtime.prefix_tree import RUN, TokenIds
from q35c.runtime.recent import Miss
from q35c.runtime.saved import Checkpoint
from q35c.runtime.session import Session

SLICE = RUN  # tokens; cuts elsewhere may change last digits
MESSAGE_START = "<|im_start|>"  # the token that begins a message, in templates of the family
MOST_CHECKPOINTS = 16  # of one session, and more only if others go on from there


def last_cut(count: int) -> int:
    """Return the last multiple of 64 below a prompt's last token, where the rest begins."""
    return (count - 1) // SLICE * SLICE


def plan_points(ids: TokenIds, message_start: int | None, branch: int = 0) -> tuple[int, ...]:
    """Return where to make checkpoints in a prompt, ascending.

    `message_start` is the token that begins a message, `branch` where another prompt left its way.
    """
    starts: list[int] = (
        [] if message_start is None else np.flatnonzero(ids == message_start).tolist()
    )
    wanted = {branch, *starts[1:2], *starts[-1:]} if starts else {branch, len(ids)}
    border = last_cut(len(ids))
    points = {min(at // SLICE * SLICE, border) for at in wanted}
    return tuple(sorted(points - {0})) or ((border,) if border else ())


@dataclass(slots=True, eq=False)
class Branch:
    """A session and its checkpoints, by length. While it is lent, it may grow but never changes below them."""

    session: Session
    salt: str
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict[int, Checkpoint])
    used: int = 0
    forks: set[int] = field(
        default_factory=set[int]
    )  # lengths from where more than one prompt went on

    def best(self, ids: TokenIds, limit: int) -> Checkpoint | None:
        """Return the last checkpoint that a prompt passes, within `limit` tokens."""
        for length in sorted(self.checkpoints, reverse=True):
            if length <= limit and ids[:length].tobytes() == self.checkpoints[length].ids:
                return self.checkpoints[length]
        return None

    def up_to(self, length: int) -> dict[int, Checkpoint]:
        """Return the checkpoints within so many tokens."""
        return {at: item for at, item in self.checkpoints.items() if at <= length}

    def add(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint; of too many one goes."""
        self.checkpoints[checkpoint.length] = checkpoint
        if len(self.checkpoints) > MOST_CHECKPOINTS:
            self.thin()

    def thin(self) -> bool:
        """Give up the checkpoint that is missed least; say whether there was one beside the first, the last and the forks.

        Only a prompt that leaves this way before the next one could use it: it then computes what lies between it and the one
        before, so the closest goes.
        """
        lengths = sorted(self.checkpoints)
        gaps = {at: at - before for before, at in pairwise(lengths[:-1]) if at not in self.forks}
        if gaps:
            del self.checkpoints[min(gaps, key=lambda at: gaps[at])]
        return bool(gaps)


class Lease:
    """A session that is being filled with a prompt, slice by slice."""

    def __init__(
        self,
        branch: Branch,
        prompt: PromptLike,
        points: Iterable[int] = (),
        miss: Miss | None = None,
        give_back: Callable[[Branch, bool], None] | None = None,
    ) -> None:
        """Go on where the session stands, which is a multiple of 64 below the prompt's last token.

        points     where to make checkpoints
        miss       why it stands not further on
        give_back  takes the branch at the end, and whether it may be used again; None: it is closed
        """
        self.session = branch.session
        self.prompt = prompt
        self.cached_tokens = branch.session.length
        self.miss = miss
        self._branch, self._points = branch, frozenset(points)
        self._give_back = give_back

    def advance(self) -> Logits | None:
        """Compute one slice; return the logits f32[V] after the prompt's last token, None before it is reached."""
        session, start = self.session, self.session.length
        if start >= last_cut(len(self.prompt)):
            return session.prefill(self.prompt[start:])
        session.extend(self.prompt[start : start + SLICE])
        if session.length in self._points:
            self._branch.add(session.checkpoint())
        return None

    def fill(self) -> Logits:
        """Compute the whole prompt; return the logits f32[V] after its last token."""
        while (logits := self.advance()) is None:
            pass
        return logits

    def end(self, *, keeps: bool = True) -> None:
        """Give the session back, for others to use unless it does not keep or its last step failed."""
        if self._give_back is None:
            self.session.close()
        else:
            self._give_back(self._branch, keeps and self.session.is_usable)
