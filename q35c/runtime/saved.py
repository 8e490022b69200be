"""Copies of a sequence's state, or of parts of it: plain data, restorable into any session of the same model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from q35c import arguments
from q35c.errors import StateError
from q35c.runtime.device import Saved
from q35c.runtime.state_file import read_state, write_state


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
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
class Snapshot(_Copy):
    """A copy of a session's state: only the cells in use. Restorable into any session of the model."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the copy to a file that only its owner may read.

        Raises OptionError for a path where no file can be, DiskRefused; an old file then stays.
        """
        metadata = {
            "kind": "snapshot",
            "digest": self.digest,
            "length": str(self.length),
            "position": str(self.position),
        }
        ids = np.frombuffer(self.ids, np.int64)
        write_state(arguments.path("path", path), metadata, [ids, *self.tensors])

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Return a copy that `save` has written.

        Raises StateError for a file that is damaged or no snapshot, MemoryRefused. Whether it is of the model is
        known when it is restored.
        """
        place = arguments.path("path", path)
        metadata, arrays = read_state(place)
        length, position = (number_of(metadata.get(name)) for name in ("length", "position"))
        is_right = metadata.get("kind") == "snapshot" and bool(arrays)
        if not is_right or arrays[0].dtype != np.int64 or arrays[0].shape != (length,):
            raise StateError("not a snapshot", where=str(place))
        tensors = tuple(arrays[1:])
        return cls(metadata.get("digest", ""), length, position, tensors, arrays[0].tobytes())


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint(_Copy):
    """A copy of what does not grow with a sequence: its recurrent state at some length.

    With the keys and values of as many tokens it is the whole state.
    """


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


def number_of(text: str | None) -> int:
    """Return the number that a text of a file is, -1 if it is none."""
    return (
        int(text)
        if text is not None and text.isascii() and text.isdigit() and len(text) < 16
        else -1
    )
