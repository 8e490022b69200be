"""Run compiled entries: fill the io block, call all threads, read the logits.

One step at a time: the arena and the io block belong to the model, so a lock surrounds every step. The thread that holds it
may come again, in what the garbage collector or a signal handler calls: it must not wait for itself, so then it is
refused, or put off until the step has ended. All pointers are checked once to be 64-byte aligned; generated code relies on it.
"""

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from q35c.artifact import Manifest
from q35c.artifact.manifest import Entry as EntryPlan
from q35c.artifact.manifest import Probe
from q35c.errors import InternalError, OptionError, Q35CError
from q35c.layouts import blobs
from q35c.runtime.cpu.blocks import Region, WeightBlock
from q35c.runtime.cpu.library import Arguments, Entry, Library, Workers
from q35c.runtime.cpu.pace import Pace
from q35c.runtime.process import Origin

Logits = NDArray[np.float32]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded run: the cycle counter before each step and after the last, on thread 0.

    `begin` and `seconds` are the perf_counter's, from before the threads start until all have ended; `starts` are the
    sequences' lengths before the run, `tokens` the rows in all.
    """

    entry: str
    tokens: int
    starts: tuple[int, ...]
    begin: float
    seconds: float
    cycles: NDArray[np.int64]


class _Recordings(list[Recording]):
    """A list that can be referred to weakly: who records holds it."""


def _nobody() -> None:
    """Stand in for the reference to the recordings while nobody records."""


class SequenceState(Protocol):
    """What a step must know about a sequence."""

    @property
    def region(self) -> Region: ...
    @property
    def length(self) -> int: ...
    @property
    def position(self) -> int: ...


class Executor:
    """Hold the code, the weights and the working memory of one model. Thread-safe."""

    def __init__(
        self,
        manifest: Manifest,
        library: Library,
        weights: WeightBlock,
        threads: int,
        *,
        yields: bool = False,
    ) -> None:
        """Start the threads. With `yields`, steps use fewer of them while others need the cores."""
        self.manifest = manifest
        self.weights = weights
        self._entries: dict[str, Entry] = {
            entry.name: library.entry(entry.symbol) for entry in manifest.entries
        }
        self._library = library
        self._workers = Workers(threads)
        self._pace = Pace(threads) if yields and threads > 1 else None
        self._lock = threading.RLock()
        self._is_running = False
        self._afterwards: deque[Callable[[], None]] = deque()
        self._arena = Region(manifest.arena_bytes, huge_bytes=manifest.arena_bytes)
        self._io = Region(manifest.io.bytes, huge_bytes=manifest.io.bytes)
        self._barrier = Region(manifest.barrier_bytes)
        self._fields = {
            name: self._io.view(field.dtype, field.shape, field.offset)
            for name, field in manifest.io.fields.items()
        }
        self._recordings: Callable[[], _Recordings | None] = _nobody
        self._is_closed = False
        self.origin = Origin()
        for block in (weights, self._arena, self._io, self._barrier):
            _check_aligned(block.address)

    @property
    def is_closed(self) -> bool:
        """Say whether `close` was called."""
        return self._is_closed

    def entry(self, name: str) -> EntryPlan:
        """Return the plan of an entry. Raises OptionError if the artifact lacks it."""
        entry = self.manifest.entry(name)
        if entry is None:
            known = [entry.name for entry in self.manifest.entries]
            raise OptionError(
                "the artifact was compiled without this entry", expected=known, got=name
            )
        return entry

    def run_sequence(
        self, entry: EntryPlan, sequence: SequenceState, tokens: Sequence[int]
    ) -> Logits:
        """Append up to `entry.max_tokens` tokens to one sequence.

        Returns a copy of the logits: f32[1, V] of the last token, f32[T, V] of all or f32[0, V]. Raises
        ExecutionError if the code reports a failure; the sequence's state is undefined then.
        """
        count = len(tokens)

        def step() -> Logits:
            region = sequence.region
            fields = self._fields
            fields["tokens"][:count] = tokens
            # Text has the same position on all three rotary axes (t, h, w).
            fields["positions"][:, :count] = np.arange(sequence.position, sequence.position + count)
            fields["slots"][0] = 0
            fields["starts"][0] = sequence.length
            return self._run(entry, [region], count, blobs.logits_rows(entry.logits, count))

        return self._alone(step)

    def run_batch(
        self, entry: EntryPlan, sequences: Sequence[SequenceState], tokens: Sequence[int]
    ) -> Logits:
        """Append one token to each of up to `batch` sequences; return a copy of the logits f32[B, V].

        Raises ExecutionError as `run_sequence` does.
        """

        def step() -> Logits:
            regions = [sequence.region for sequence in sequences]
            fields = self._fields
            for row, (sequence, region) in enumerate(zip(sequences, regions, strict=True)):
                fields["tokens"][row] = tokens[row]
                fields["positions"][:, row] = sequence.position
                fields["slots"][row] = (region.address - regions[0].address) // blobs.ALIGNMENT
                fields["starts"][row] = sequence.length
            return self._run(entry, regions, len(regions), len(regions))

        return self._alone(step)

    @contextmanager
    def record(self) -> Generator[list[Recording]]:
        """Record every run that ends within the block, of all sessions; blocks do not nest."""
        self.check_usable()
        found = _Recordings()
        self._recordings = weakref.ref(found)
        try:
            yield found
        finally:
            self._recordings = _nobody

    def run_probe(self, probe: Probe, address: int, amount: int) -> float:
        """Return the seconds of a probe over memory that it may overwrite; it touches nothing else."""
        _check_aligned(address)
        arguments = Arguments(0, address, 0, 0, self._barrier.address, amount)

        def step() -> float:
            self.check_usable()
            entry = self._library.entry(probe.symbol)
            begin = time.perf_counter()
            self._workers.run(entry, arguments)
            return time.perf_counter() - begin

        return self._alone(step)

    def when_free(self, action: Callable[[], None]) -> None:
        """Do something that makes steps: now, or after the step that this thread is in the midst of."""
        with self._lock:
            if self._is_running:
                self._afterwards.append(action)
                return
        action()

    def close(self) -> None:
        """End the worker threads and let go of the weights; later steps raise OptionError."""
        self._is_closed = True
        if not self.origin.is_elsewhere:
            self.when_free(self._release)

    def check_usable(self) -> None:
        """Raise OptionError if the model is closed, or was loaded by a process that forked this one."""
        self.origin.check()
        if self._is_closed:
            raise OptionError("the model is closed", hint="load it again")

    def _release(self) -> None:
        with self._lock:
            if self._entries:
                self._workers.close()
                # Both are unmapped when the worker threads have let go of them, too.
                self._entries.clear()
                del self._library, self.weights

    def _alone(self, step: Callable[[], Result]) -> Result:
        """Return what a step returns; meanwhile no other runs."""
        self.origin.check()
        with self._lock:
            if self._is_running:
                raise OptionError(
                    "this thread is in the midst of a step of the model",
                    hint="let a signal handler or finalizer set a flag, and run the model after the step",
                )
            self._is_running = True
            try:
                return step()
            finally:
                self._is_running = False
                while self._afterwards:
                    # Who asked is not here; a session whose step failed says so at its next use.
                    with contextlib.suppress(Q35CError):
                        self._afterwards.popleft()()

    def _run(self, plan: EntryPlan, regions: Sequence[Region], tokens: int, rows: int) -> Logits:
        """Run an entry over the io block; `regions` stay in memory, even if a session is closed meanwhile."""
        self.check_usable()
        _check_aligned(regions[0].address)
        arguments = Arguments(
            self.weights.address,
            regions[0].address,
            self._arena.address,
            self._io.address,
            self._barrier.address,
            tokens,
        )
        recordings = self._recordings()
        self._fields["clock"][0] = recordings is not None
        # What is recorded is what all threads do.
        pace = self._pace if recordings is None else None
        begin = time.perf_counter()
        self._workers.run(self._entries[plan.name], arguments, pace and pace.threads)
        seconds = time.perf_counter() - begin
        if pace is not None:
            pace.note((plan.name, tokens), seconds)
        if recordings is not None and recordings is self._recordings():
            starts = tuple(self._fields["starts"][: len(regions)].tolist())
            cycles = self._fields["clock"][1 : len(plan.steps) + 2].copy()
            recordings.append(Recording(plan.name, tokens, starts, begin, seconds, cycles))
        return self._fields["logits"][:rows].copy()


def _check_aligned(address: int) -> None:
    if address % blobs.ALIGNMENT:
        raise InternalError("a block is not 64-byte aligned", got=hex(address))
