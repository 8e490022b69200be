"""Python functions in the place of compiled programs."""

from __future__ import annotations

import struct
from collections.abc import Callable

from q35c.runtime.cpu.library import Frame

_TID = 13  # of the sixteen words that a frame holds: each value behind its type


class StandIn:
    """An entry whose shares are calls of a function with the thread's number."""

    symbol = "stand-in"

    def __init__(self, share: Callable[[int], int]) -> None:
        self._share = share

    def bind(self, frame: Frame) -> Callable[[], int]:
        """Return the call, as `Entry.bind` does."""
        return lambda: self._share(struct.unpack("<16q", frame.values)[_TID])
