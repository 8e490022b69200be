"""A session: the state of one sequence, and everything that may be done with it.

The recurrent state of the linear-attention layers has no past: a session cannot be cut back, only
restored from a snapshot. Cache length and rotary position are two counters, because an image advances
them differently.
"""

import operator
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q35c.artifact.manifest import Entry, StateTensor
from q35c.errors import OptionError, PromptError
from q35c.layouts.blobs import GRID
from q35c.runtime.executor import Executor, Logits
from q35c.runtime.memory import (
    Region,
    StateBudget,
    available_memory,
    check_allocation,
    used_cells,
)

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of a session's state: only the cells in use. Restorable into any session of the model."""

    digest: str
    length: int
    position: int
    tensors: tuple[NDArray[Any], ...]

    @property
    def bytes(self) -> int:
        """Return the memory that the copy takes."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Session:
    """One sequence of tokens. For one thread at a time; several sessions may run at once."""

    def __init__(self, executor: Executor, budget: StateBudget, digest: str, context: int) -> None:
        """Reserve the state of up to `context` tokens. Raises MemoryRefused if it does not fit."""
        self.context = context
        self.length = 0
        self.position = 0
        self.high_water = 0
        self._executor = executor
        self._budget = budget
        self._digest = digest
        self._is_broken = False
        self._owner = threading.Lock()
        budget.admit(self)
        state = executor.manifest.state
        is_full = context == executor.manifest.context
        self._region: Region | None = Region(
            state.bytes, huge_bytes=state.bytes if is_full else _fixed_prefix(state.tensors)
        )

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the state's memory back. Closing twice is harmless."""
        self._region = None
        self._budget.release(self)

    @property
    def region(self) -> Region:
        """Return the state's memory. Raises OptionError if the session is closed."""
        if self._region is None:
            raise OptionError("the session is closed")
        return self._region

    def prefill(self, ids: Iterable[int], progress: Progress | None = None) -> Logits:
        """Append tokens; return the logits f32[V] after the last. May be called at any point.

        Cutting tokens into calls where the length is a multiple of 32 changes no bit; elsewhere last digits.

        Raises PromptError if there are none, too many for the context or some outside the
        vocabulary; then nothing has changed.
        """
        tokens = check_ids(ids, self._executor.manifest.model.vocab_size)
        extend, prefill = map(self._executor.entry, ("extend", "prefill"))
        with self._owned():
            self._check_room(len(tokens))
            logits = np.empty((0, 0), np.float32)
            for start, end in pieces(self.length, len(tokens), prefill.max_tokens):
                entry = prefill if end == len(tokens) else extend
                logits = self._append(entry, tokens[start:end])
                if progress is not None:
                    progress(end, len(tokens))
        return logits[0]

    def decode(self, token: int) -> Logits:
        """Append one token; return the logits f32[V] after it. Raises PromptError as `prefill`."""
        return Session.decode_together([self], [token])[0]

    def score(self, ids: Iterable[int], progress: Progress | None = None) -> Logits:
        """Append tokens; return the logits f32[S, V] after each.

        Raises PromptError as `prefill`, MemoryRefused if the result would not fit, OptionError if the
        artifact was compiled without the score entry.
        """
        vocab = self._executor.manifest.model.vocab_size
        tokens = check_ids(ids, vocab)
        entry = self._executor.entry("score")
        check_allocation("the logits", len(tokens) * vocab * 4, available_memory())
        logits: Logits = np.empty((len(tokens), vocab), dtype=np.float32)
        with self._owned():
            self._check_room(len(tokens))
            for start, end in pieces(self.length, len(tokens), entry.max_tokens):
                logits[start:end] = self._append(entry, tokens[start:end])
                if progress is not None:
                    progress(end, len(tokens))
        return logits

    @staticmethod
    def decode_together(sessions: "Sequence[Session]", tokens: Sequence[int]) -> Logits:
        """Append one token to each of up to `batch` sessions of one model; return logits f32[B, V].

        Raises PromptError as `prefill`, OptionError for too many, mixed or repeated sessions; then
        nothing has changed.
        """
        executor = sessions[0]._executor
        ids = check_ids(tokens, executor.manifest.model.vocab_size)
        if len(sessions) > executor.manifest.batch or len(ids) != len(sessions):
            raise OptionError(
                "wrong number of sequences",
                expected=f"1 to {executor.manifest.batch} sessions with one token each",
                got=f"{len(sessions)} sessions, {len(ids)} tokens",
            )
        if any(session._executor is not executor for session in sessions):
            raise OptionError("the sessions belong to several models")
        with ExitStack() as owned:
            for session in sessions:
                owned.enter_context(session._owned())
            for session in sessions:
                session._check_room(1)
            for session in sessions:
                session._is_broken = True
            logits = executor.run_batch(executor.entry("decode"), sessions, ids)
            for session in sessions:
                session._advance(1)
        return logits

    def snapshot(self) -> Snapshot:
        """Copy the state; `restore` brings it back bit for bit."""
        with self._owned():
            self._check_usable()
            parts = tuple(part.copy() for part in self._parts(self.length))
            return Snapshot(self._digest, self.length, self.position, parts)

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of this or another session of the same model, also after a failure.

        Raises OptionError if it stems from another model or is longer than this session's context.
        """
        if snapshot.digest != self._digest:
            raise OptionError("the snapshot stems from another model")
        if snapshot.length > self.context:
            raise OptionError(
                "the snapshot is longer than the session's context",
                expected=f"at most {self.context} tokens",
                got=snapshot.length,
            )
        with self._owned():
            self._is_broken = True
            for part, copy in zip(self._parts(snapshot.length), snapshot.tensors, strict=True):
                part[...] = copy
            self.length, self.position = snapshot.length, snapshot.position
            self.high_water = max(self.high_water, self.length)
            self._is_broken = False

    def reset(self) -> None:
        """Make the session empty, also after a failure, and give the state's memory back."""
        with self._owned():
            self._is_broken = True
            self.region.zero()
            self.length = self.position = self.high_water = 0
            self._is_broken = False

    def _parts(self, length: int) -> Iterator[NDArray[Any]]:
        """Yield views of the state that `length` tokens use: along axis 1 where it grows."""
        manifest = self._executor.manifest
        for tensor in manifest.state.tensors:
            view = self.region.view(tensor.dtype, tensor.shape, tensor.offset)
            if tensor.growth == "context":
                view = view[:, : used_cells(tensor.shape, manifest.context, length)]
            yield view

    def _append(self, entry: Entry, chunk: Sequence[int]) -> Logits:
        self._is_broken = True  # until the step has ended
        logits = self._executor.run_sequence(entry, self, chunk)
        self._advance(len(chunk))
        return logits

    def _advance(self, count: int) -> None:
        self.length += count
        self.position += count
        self.high_water = max(self.high_water, self.length)
        self._is_broken = False

    def _check_room(self, count: int) -> None:
        self._check_usable()
        if self.length + count > self.context:
            raise PromptError(
                "the sequence would exceed the context",
                expected=f"at most {self.context - self.length} more tokens",
                got=count,
                hint="shorten it, or ask for a larger context",
            )

    def _check_usable(self) -> None:
        if self._region is None:
            raise OptionError("the session is closed")
        if self._is_broken:
            raise OptionError(
                "a step of this session failed or was interrupted: its state is undefined",
                hint="restore a snapshot, or reset the session",
            )

    @contextmanager
    def _owned(self) -> Generator[None]:
        if not self._owner.acquire(blocking=False):
            raise OptionError(
                "the session is in use, by another thread or twice in one batch",
                hint="give each thread and each row its own session",
            )
        try:
            yield
        finally:
            self._owner.release()


def pieces(before: int, count: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each call that appends `count` tokens to `before`, up to `most` in one.

    All but the last end on the grid, where a cut changes no bit, if `most` reaches so far.
    """
    start = 0
    while start < count:
        end = min(start + most, count)
        on_grid = end - (before + end) % GRID
        if end < count and on_grid > start:
            end = on_grid
        yield start, end
        start = end


def check_ids(ids: Iterable[int], vocab: int) -> list[int]:
    """Return token ids as a list. Raises PromptError if it is empty or an id is outside 0..vocab-1."""
    listed = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    if not listed:
        raise PromptError("the prompt holds no tokens", hint="give at least one token")
    for index, token in enumerate(listed):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise PromptError("not a token id", where=f"token {index}", got=repr(token)[:80])
        if not 0 <= (token := operator.index(token)) < vocab:
            raise PromptError(
                "token id is outside the vocabulary",
                where=f"token {index}",
                expected=f"0 to {vocab - 1}",
                got=token,
            )
        listed[index] = token
    return listed


def _fixed_prefix(tensors: Sequence[StateTensor]) -> int:
    """Return the bytes of the leading tensors that do not grow: they are used whole from the start."""
    growing = (tensor.offset for tensor in tensors if tensor.growth == "context")
    return next(growing, 0)
