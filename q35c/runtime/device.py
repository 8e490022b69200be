"""What the runtime needs from a kind of machine, which is a folder beside this file, named once in `targets.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from q35c.artifact import Artifact
from q35c.artifact.entries import Entry
from q35c.artifact.leaves import Probe
from q35c.artifact.target import Target
from q35c.artifact.tower import Tower
from q35c.runtime.memory import Available

Logits = NDArray[np.float32]
Rows = NDArray[np.float32]
Saved = tuple[NDArray[Any], ...]  # a copy of a state: what of each tensor was in use


class Block(Protocol):
    """Memory that programs and the host reach; it lives as long as something refers to it or to a view of it."""

    @property
    def bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def view(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Return a writable array over a part of the block; `dtype` is the manifest's name."""
        ...


class State(Protocol):
    """The memory of one sequence, at first zero; it lives as long as something refers to it."""

    @property
    def address(self) -> int: ...

    def zero(self) -> None:
        """Make it zero and give its memory back."""
        ...

    def save(self, tokens: int) -> Saved:
        """Return a copy of what so many tokens use."""
        ...

    def restore(self, saved: Saved, tokens: int) -> None:
        """Bring a copy back, which `save` made for so many tokens."""
        ...

    def save_fixed(self) -> Saved:
        """Return a copy of what does not grow with the tokens."""
        ...

    def restore_fixed(self, saved: Saved) -> None:
        """Bring a copy back that `save_fixed` made."""
        ...

    def save_cells(self, start: int, end: int) -> Saved:
        """Return a copy of what grows, for a range of tokens whose ends are multiples of 32."""
        ...

    def restore_cells(self, saved: Saved, start: int, end: int) -> None:
        """Bring a copy back that `save_cells` made for the same range."""
        ...


class Media(NamedTuple):
    """What stands in place of a call's negative tokens: their rows f32[R, hidden] in order, and positions i32[3, T] of all."""

    positions: NDArray[np.int32]
    rows: NDArray[np.float32]


class HasState(Protocol):
    """A sequence: its state, its length in tokens, and the rotary position of the next one."""

    @property
    def state(self) -> State: ...
    @property
    def length(self) -> int: ...
    @property
    def position(self) -> int: ...


# Gets the perf_counter before the threads start, the seconds until all have ended, and the cycle counter before each step and
# after the last, on thread 0.
Record = Callable[[float, float, NDArray[np.int64]], None]


class Device(Protocol):
    """A model on its machine: code, weights and working memory. Runs are one caller's at a time."""

    @property
    def name(self) -> str:
        """The device as users call it, with what identifies it."""
        ...

    @property
    def threads(self) -> int:
        """The most threads that run a program."""
        ...

    def reserve(self, context: int) -> State:
        """Return the state of a new sequence of up to `context` tokens. Raises MemoryRefused."""
        ...

    def block(self, size: int) -> Block:
        """Return memory for probes. Raises MemoryRefused."""
        ...

    def run(
        self,
        entry: Entry,
        sequences: Sequence[HasState],
        tokens: Sequence[int],
        media: Media | None = None,
        record: Record | None = None,
    ) -> Logits:
        """Append tokens to sequences, equally many to each; return a copy of the logits that the entry writes, f32[rows, V].

        `media` is of one sequence; without it all are text, and go on at the sequences' positions.
        Their states stay in memory meanwhile, even if a session is closed. Raises ExecutionError if the code reports a
        failure; the states are undefined then.
        """
        ...

    def see(
        self,
        tower: Tower,
        inputs: Mapping[str, NDArray[Any]],
        tokens: int,
        record: Record | None = None,
    ) -> Rows:
        """Return what the vision tower makes of a picture of so many tokens: rows f32[tokens, hidden].

        `inputs` are arrays by the names in the tower's io, as long as the picture needs. Raises ExecutionError if the code
        reports a failure.
        """
        ...

    def run_probe(self, probe: Probe, address: int, amount: int) -> float:
        """Return the seconds of a probe over a block that it may overwrite; it touches nothing else."""
        ...

    def close(self) -> None:
        """End its threads and let go of code and weights. Closing twice is harmless."""
        ...


class Machine(Protocol):
    """A kind of machine, before a model is loaded."""

    @property
    def threads(self) -> int:
        """The threads that a model will use."""
        ...

    @property
    def reads_all(self) -> bool:
        """Say whether loading reads all weights anyway, so that a check of their hash costs little."""
        ...

    def check(self, target: Target) -> None:
        """Raise an UnsupportedMachine, as IncompatibleCPU, NoDevice or IncompatibleDevice, if it cannot run code for this target."""
        ...

    def available_memory(self) -> Available:
        """Return the bytes that weights and states may still take."""
        ...

    def sequence_bytes(self, tokens: int) -> int:
        """Return the bytes that the state of a sequence takes after so many tokens."""
        ...

    def load(self, artifact: Artifact, *, mapped: bool, is_verified: bool) -> Device:
        """Load code and weights. Raises MemoryRefused; ArtifactError if the weights differ from their hash, where asked for."""
        ...
