"""A session: the state of one sequence, and everything that may be done with it.

The recurrent state of the linear-attention layers has no past: a session cannot be cut back, only
restored from a snapshot, or rewound to a checkpoint, which is a snapshot without keys and values: those of earlier tokens stay
where they are. Length in cells and rotary position are two counters: an image advances them differently.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from q35c import arguments
from q35c.artifact.entries import Entry
from q35c.errors import OptionError, PromptError
from q35c.layouts.cache import CELLS
from q35c.runtime.device import Logits, State
from q35c.runtime.executor import Executor
from q35c.runtime.memory import StateBudget, available_memory, check_allocation
from q35c.runtime.multimodal import Prompt, PromptLike, check_prompt, place
from q35c.runtime.prompts import check_ids, pieces
from q35c.runtime.saved import Cells, Checkpoint, Snapshot, end_of

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)
Result = TypeVar("Result")


class _Claim:
    """One call's claim to its sessions; it ends for all of them at once."""

    def __init__(self) -> None:
        self.is_over = False


class Session:
    """One sequence of tokens. For one thread at a time; several sessions may run at once."""

    def __init__(self, executor: Executor, budget: StateBudget, digest: str, context: int) -> None:
        """Reserve the state of up to `context` tokens. Raises MemoryRefused if it does not fit."""
        executor.check_usable()
        self.context = context
        self.length = 0
        self.position = 0
        self.high_water = 0
        self.is_closed = False
        self._executor = executor
        self._digest = digest
        self._budget = budget
        self._ids = array("q")
        self._is_broken = False
        self._claim = _Claim()
        self._claim.is_over = True
        budget.admit(self)
        self._state: State | None = executor.device.reserve(context)

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
        self.is_closed = True
        self._state = None

    @property
    def is_usable(self) -> bool:
        """Say whether a step can be made: the session is open and its last step has succeeded."""
        return not (self.is_closed or self._is_broken or self._executor.is_closed)

    def check_owner(self, executor: Executor) -> None:
        """Raise OptionError if this session belongs to another model than the executor."""
        if executor is not self._executor:
            raise OptionError("the session belongs to another model", where="session")

    @property
    def state(self) -> State:
        """Return the state's memory. Raises OptionError if the session is closed."""
        if self._state is None:
            raise OptionError("the session is closed")
        return self._state

    @property
    def ids(self) -> NDArray[np.int64]:
        """Return a copy of what the cells hold: token ids, and negative numbers for rows of pictures."""
        return np.array(self._ids, dtype=np.int64)

    def resize(self, context: int) -> None:
        """Change the number of tokens that memory is kept for; the state stays as it is.

        Raises MemoryRefused if they would not fit beside other sessions; then nothing has changed. OptionError for
        fewer than the session holds, or more than were compiled.
        """
        low, high = max(1, self.length), self._executor.manifest.max_context
        context = arguments.integer("context", context, low, high)
        before, self.context = self.context, context
        try:
            self._budget.admit(self)
        except BaseException:
            self.context = before
            raise

    def extend(self, ids: PromptLike) -> None:
        """Append tokens without computing logits. Raises as `prefill`."""
        tokens = check_prompt(ids, self._executor.manifest)
        entry = self._executor.entries.none

        def append() -> None:
            self._check_room(len(tokens))
            for start, end in pieces(self.length, len(tokens), entry.tokens):
                self._append(entry, tokens[start:end])

        Session._use([self], append)

    def prefill(self, ids: PromptLike, progress: Progress | None = None) -> Logits:
        """Append tokens; return the logits f32[V] after the last. May be called at any point.

        `ids` is a list, tuple, other sequence, integer array or `MultimodalPrompt`. Cutting tokens into calls where the length is a
        multiple of 32 changes no bit; elsewhere last digits. Raises PromptError if there are none, too many for the
        context or some outside the vocabulary; then nothing has changed.
        """
        tokens = check_prompt(ids, self._executor.manifest)
        arguments.callback("progress", progress)
        entries = self._executor.entries

        def append() -> Logits:
            self._check_room(len(tokens))
            logits = np.empty((0, 0), np.float32)
            for start, end in pieces(self.length, len(tokens), entries.last.tokens):
                entry = entries.last if end == len(tokens) else entries.none
                logits = self._append(entry, tokens[start:end])
                if progress is not None:
                    progress(end, len(tokens))
            return logits[0]

        return Session._use([self], append)

    def decode(self, token: int) -> Logits:
        """Append one token; return the logits f32[V] after it. Raises PromptError as `prefill`."""
        return Session.decode_together([self], [token])[0]

    def score(self, ids: PromptLike, progress: Progress | None = None) -> Logits:
        """Append tokens; return the logits f32[S, V] after each.

        Raises PromptError as `prefill`, MemoryRefused if the result would not fit.
        """
        vocab = self._executor.manifest.model.vocab_size
        tokens = check_prompt(ids, self._executor.manifest)
        arguments.callback("progress", progress)
        entry = self._executor.entries.all
        check_allocation("the logits", len(tokens) * vocab * 4, available_memory())
        logits: Logits = np.empty((len(tokens), vocab), dtype=np.float32)

        def append() -> Logits:
            self._check_room(len(tokens))
            for start, end in pieces(self.length, len(tokens), entry.tokens):
                logits[start:end] = self._append(entry, tokens[start:end])
                if progress is not None:
                    progress(end, len(tokens))
            return logits

        return Session._use([self], append)

    def append_at_last(self, token: int) -> None:
        """Append a token, or have it appended after the step that this thread is in the midst of.

        There the garbage collector may call, or a signal handler. Until then the session counts as undefined.
        """
        self._check_room(1)
        self._is_broken = True

        def append() -> None:
            self._is_broken = False
            if not self.is_closed:
                self.prefill([token])

        self._executor.when_free(append)

    @staticmethod
    def decode_together(sessions: "Sequence[Session]", tokens: Sequence[int]) -> Logits:
        """Append one token to each of some sessions of one model; return logits f32[B, V].

        One step takes as many as the model was compiled for; more are taken by several, one after the other. Raises
        PromptError as `prefill`, OptionError for mixed or repeated sessions; then nothing has changed.
        """
        rows = arguments.sequence("sessions", sessions, "a list of sessions")
        sessions = [arguments.instance("sessions", session, Session) for session in rows]
        if not sessions:
            raise OptionError("no sessions to decode", where="sessions")
        executor = sessions[0]._executor
        manifest = executor.manifest
        ids = check_ids(tokens, manifest.model.vocab_size, manifest.max_context)
        if len(ids) != len(sessions):
            raise OptionError(
                "wrong number of sequences",
                expected="sessions with one token each",
                got=f"{len(sessions)} sessions, {len(ids)} tokens",
            )
        if any(session._executor is not executor for session in sessions):
            raise OptionError("the sessions belong to several models")

        def append() -> Logits:
            for session in sessions:
                session._check_room(1)
            for session in sessions:
                session._is_broken = True
            logits: list[Logits] = []
            for first in range(0, len(ids), manifest.batch):
                step = slice(first, first + manifest.batch)
                logits.append(executor.run(executor.entries.batch, sessions[step], ids[step]))
                for session, token in zip(sessions[step], ids[step], strict=True):
                    session._advance([token], 1)
            return logits[0] if len(logits) == 1 else np.concatenate(logits)

        return Session._use(sessions, append)

    def snapshot(self) -> Snapshot:
        """Copy the state; `restore` brings it back bit for bit."""

        def copy() -> Snapshot:
            self._check_usable()
            saved = self.state.save(self.length)
            return Snapshot(self._digest, self.length, self.position, saved, self._ids.tobytes())

        return Session._use([self], copy)

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of this or another session of the same model, also after a failure.

        Raises OptionError if it stems from another model or is longer than this session's context.
        """
        snapshot = arguments.instance("snapshot", snapshot, Snapshot)
        self._check_origin("snapshot", snapshot)

        def fill() -> None:
            self._is_broken = True
            self.state.restore(snapshot.tensors, snapshot.length)
            self._stand_at(snapshot)

        Session._use([self], fill)

    def checkpoint(self) -> Checkpoint:
        """Copy what `rewind` needs to come back to this point: all but keys and values."""

        def copy() -> Checkpoint:
            self._check_usable()
            saved = self.state.save_fixed()
            return Checkpoint(self._digest, self.length, self.position, saved, self._ids.tobytes())

        return Session._use([self], copy)

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Return to a checkpoint of this session, bit for bit, also after a failure.

        Raises OptionError if the session's tokens up to there are others by now.
        """
        checkpoint = arguments.instance("checkpoint", checkpoint, Checkpoint)
        self._check_origin("checkpoint", checkpoint)
        if self._ids[: checkpoint.length].tobytes() != checkpoint.ids:
            raise OptionError("the session's tokens are not those of the checkpoint")

        def fill() -> None:
            self._is_broken = True
            self.state.restore_fixed(checkpoint.tensors)
            self._stand_at(checkpoint)

        Session._use([self], fill)

    def export_kv(self, start: int, end: int) -> Cells:
        """Copy keys and values of a range of tokens, of which both ends are multiples of 32. Raises OptionError."""
        start = arguments.integer("start", start, 0, self.length)
        end = arguments.integer("end", end, start, self.length)
        if start % CELLS or end % CELLS:
            expected = f"multiples of {CELLS}"
            raise OptionError("the range ends inside a block", expected=expected, got=(start, end))

        def copy() -> Cells:
            return Cells(self._digest, start, end, self.state.save_cells(start, end))

        return Session._use([self], copy)

    def import_kv(self, cells: Iterable[Cells], checkpoint: Checkpoint) -> None:
        """Become the sequence of a checkpoint, whose keys and values are given in ranges.

        Raises OptionError if they are of another model, leave a gap, or do not fit the context.
        """
        checkpoint = arguments.instance("checkpoint", checkpoint, Checkpoint)
        self._check_origin("checkpoint", checkpoint)
        ranges = [arguments.instance("cells", item, Cells) for item in cells]
        for item in ranges:
            self._check_origin("cells", item)
        reached = end_of(ranges)
        if reached < checkpoint.length:
            expected = f"keys and values of {checkpoint.length} tokens"
            raise OptionError("tokens are missing", where="cells", expected=expected, got=reached)

        def fill() -> None:
            self._is_broken = True
            for item in ranges:
                self.state.restore_cells(item.tensors, item.start, item.end)
            self.state.restore_fixed(checkpoint.tensors)
            self._stand_at(checkpoint)
            self.high_water = max(self.high_water, reached)

        Session._use([self], fill)

    def reset(self) -> None:
        """Make the session empty, also after a failure, and give the state's memory back."""

        def clear() -> None:
            self._is_broken = True
            self.state.zero()
            self.length = self.position = self.high_water = 0
            self._ids = array("q")
            self._is_broken = False

        Session._use([self], clear)

    def _check_origin(self, name: str, saved: Snapshot | Checkpoint | Cells) -> None:
        """Raise OptionError for what another model made, or what is longer than this session's context."""
        if saved.digest != self._digest:
            raise OptionError(f"the {name} stems from another model")
        length = saved.end if isinstance(saved, Cells) else saved.length
        if length > self.context:
            raise OptionError(
                f"the {name} is longer than the session's context",
                expected=f"at most {self.context} tokens",
                got=length,
            )

    def _stand_at(self, saved: Snapshot | Checkpoint) -> None:
        self.length, self.position = saved.length, saved.position
        self.high_water = max(self.high_water, self.length)
        self._ids = array("q", saved.ids)
        self._is_broken = False

    def _append(self, entry: Entry, chunk: Prompt) -> Logits:
        self._is_broken = True  # until the step has ended
        placed = place(chunk, self.position)
        logits = self._executor.run(entry, [self], placed.tokens, placed.media)
        self._advance(placed.ids, placed.positions)
        return logits

    def _advance(self, ids: Iterable[int], positions: int) -> None:
        self._ids.extend(ids)
        self.length = len(self._ids)
        self.position += positions
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
        if self._state is None:
            raise OptionError("the session is closed")
        if self._is_broken:
            raise OptionError(
                "a step of this session failed or was interrupted: its state is undefined",
                hint="restore a snapshot, or reset the session",
            )

    @staticmethod
    def _use(sessions: "Sequence[Session]", action: Callable[[], Result]) -> Result:
        """Return what `action` returns; meanwhile nobody else may use the sessions.

        A signal handler may raise after any call, also after one that takes or gives back a lock: its holder could lose
        it for ever. Claims need none, as Python changes threads at no other place than signals come; and they end by
        one assignment, for all sessions at once.
        """
        sessions[0]._executor.check_usable()
        claim = _Claim()
        try:
            for session in sessions:
                if not session._claim.is_over:
                    raise OptionError(
                        "the session is in use, by another thread or twice in one batch",
                        hint="give each thread and each row its own session",
                    )
                session._claim = claim
            return action()
        finally:
            claim.is_over = True
