"""Copies of a sequence's state, or of parts of it: plain data, restorable into any session of the same model."""

from collections.abc import Sequence
from dataclasses import dataclass

from q35c.runtime.device import Saved


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A copy of a session's state: only the cells in use. Restorable into any session of the model."""

    digest: str
    length: int
    position: int
    tensors: Saved
    ids: bytes  # the sequence's tokens, i32

    @property
    def bytes(self) -> int:
        """Return the memory that the copy takes."""
        return sum(tensor.nbytes for tensor in self.tensors) + len(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A copy of what does not grow with a sequence: its recurrent state at some length.

    With the keys and values of as many tokens it is the whole state.
    """

    digest: str
    length: int
    position: int
    tensors: Saved
    ids: bytes  # the sequence's tokens, i32

    @property
    def bytes(self) -> int:
        """Return the memory that the copy takes."""
        return sum(tensor.nbytes for tensor in self.tensors) + len(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """A copy of the keys and values of the tokens from `start` up to `end`, both on a border of blocks."""

    digest: str
    start: int
    end: int
    tensors: Saved

    @property
    def bytes(self) -> int:
        """Return the memory that the copy takes."""
        return sum(tensor.nbytes for tensor in self.tensors)


def end_of(ranges: Sequence[Cells]) -> int:
    """Return the tokens up to which ranges follow each other without a gap, from the first token on."""
    reached = 0
    for item in ranges:
        if item.start > reached:
            break
        reached = max(reached, item.end)
    return reached
