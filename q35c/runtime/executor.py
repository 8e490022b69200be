"""Run compiled entries, one step at a time.

Working memory belongs to the model, so a lock surrounds every step. The thread that holds it may come again, in what the
garbage collector or a signal handler calls: it must not wait for itself, so then it is refused, or put off until the step
has ended.
"""

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from q35c.artifact import Manifest
from q35c.artifact.entries import Entry
from q35c.artifact.leaves import Probe
from q35c.artifact.tower import NAME as VISION
from q35c.artifact.tower import Tower
from q35c.errors import OptionError, Q35CError
from q35c.runtime.device import Device, HasState, Logits, Media, Rows
from q35c.runtime.process import Origin

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


class Executor:
    """Hold one model on its device. Thread-safe."""

    def __init__(self, manifest: Manifest, device: Device) -> None:
        self.manifest = manifest
        self.device = device
        self.entries = manifest.text_entries
        self.origin = Origin()
        self._lock = threading.RLock()
        self._is_running = False
        self._afterwards: deque[Callable[[], None]] = deque()
        self._recordings: Callable[[], _Recordings | None] = _nobody
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Say whether `close` was called."""
        return self._is_closed

    def run(
        self,
        entry: Entry,
        sequences: Sequence[HasState],
        tokens: Sequence[int],
        media: Media | None = None,
    ) -> Logits:
        """Append tokens to sequences, up to `entry.tokens` to each and equally many; `media` for negative ones.

        Returns a copy of the logits: f32[B, V] of the sequences' last tokens, f32[B * T, V] of all or f32[0, V]. Raises
        ExecutionError if the code reports a failure; the sequences' state is undefined then.
        """

        def step() -> Logits:
            recordings = self._recordings()
            if recordings is None:
                return self.device.run(entry, sequences, tokens, media)
            starts = tuple(sequence.length for sequence in sequences)

            def note(begin: float, seconds: float, cycles: NDArray[np.int64]) -> None:
                if recordings is self._recordings():
                    made = Recording(entry.name, len(tokens), starts, begin, seconds, cycles)
                    recordings.append(made)

            return self.device.run(entry, sequences, tokens, media, note)

        return self._alone(step)

    def see(self, tower: Tower, inputs: Mapping[str, NDArray[Any]], tokens: int) -> Rows:
        """Return the rows f32[tokens, hidden] that the vision tower makes of a picture, as `Device.see`."""

        def step() -> Rows:
            recordings = self._recordings()
            if recordings is None:
                return self.device.see(tower, inputs, tokens)

            def note(begin: float, seconds: float, cycles: NDArray[np.int64]) -> None:
                if recordings is self._recordings():
                    recordings.append(Recording(VISION, tokens, (), begin, seconds, cycles))

            return self.device.see(tower, inputs, tokens, note)

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

        return self._alone(lambda: self.device.run_probe(probe, address, amount))

    def when_free(self, action: Callable[[], None]) -> None:
        """Do something that makes steps: now, or after the step that this thread is in the midst of."""
        with self._lock:
            if self._is_running:
                self._afterwards.append(action)
                return
        action()

    def close(self) -> None:
        """End the device's threads and let go of the weights; later steps raise OptionError."""
        self._is_closed = True
        if not self.origin.is_elsewhere:
            self.when_free(self._release)

    def check_usable(self) -> None:
        """Raise OptionError if the model is closed, or was loaded by a process that forked this one."""
        self.origin.check()
        if self._is_closed:
            raise self._closed()

    def _closed(self) -> OptionError:
        return OptionError("the model is closed", hint="load it again")

    def _release(self) -> None:
        with self._lock:
            self.device.close()

    def _alone(self, step: Callable[[], Result]) -> Result:
        """Return what a step returns; meanwhile no other runs."""
        self.origin.check()
        with self._lock:
            if self._is_running:
                raise OptionError(
                    "this thread is in the midst of a step of the model",
                    hint="let a signal handler or finalizer set a flag, and run the model after the step",
                )
            self._is_running = (
                True  # from here on a handler that closes the model waits for the step
            )
            try:
                if self._is_closed:
                    raise self._closed()
                return step()
            finally:
                self._is_running = False
                while self._afterwards:
                    # Who asked is not here; a session whose step failed says so at its next use.
                    with contextlib.suppress(Q35CError):
                        self._afterwards.popleft()()
