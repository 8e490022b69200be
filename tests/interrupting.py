"""Interrupt steps at random or at every instant, and see that the next ones are right. A process of its own: it may hang.

    python -m tests.interrupting ARTIFACT random|every SEED COUNT

`random`: alarms come at random moments of operations, until COUNT have raised within one. `every`: a signal becomes pending before each
COUNT-th bytecode that the main thread runs for an operation, and Python calls the handler where it next looks for signals.
Prints how often a handler raised. Ends with a traceback of all threads when nothing happens for a minute.
"""

from __future__ import annotations

import faulthandler
import functools
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from types import FrameType
from typing import Any, ClassVar

import numpy as np

import q35c
from q35c.artifact import read_artifact
from q35c.errors import OptionError
from q35c.runtime.session import Session

IDS = [int(i) for i in np.random.default_rng(3).integers(0, 200, 40)]
START, NEXT, PATIENCE_SECONDS = 5, 7, 60
MOST_ALARMS = 10  # for each that comes in time, on whatever else is busy
TRIES = 5  # for an alarm that came too early or too late


class Subject:
    """Sessions of one model that always hold a beginning of IDS, and what must come next."""

    def __init__(self, path: str) -> None:
        # Threads inherit the mask: the kernel gives the alarm to the main thread, which alone can be interrupted.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        is_cpu = read_artifact(path).manifest.target.backend == "cpu"
        self.model = q35c.load(path, threads=2 if is_cpu else None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        self.session, self.other = self.model.session(64), self.model.session(64)
        self.saved = [self.saved_at(length) for length in (START, 20)]

    def saved_at(self, length: int) -> Any:
        self.session.reset()
        self.session.prefill(IDS[:length])
        return self.session.snapshot()

    @functools.cache  # noqa: B019
    def wanted(self, length: int) -> np.ndarray:
        """Return the logits after IDS[:length] and then NEXT."""
        with self.model.session(64) as fresh:
            if length:
                fresh.prefill(IDS[:length])
            return fresh.decode(NEXT)

    def operations(self) -> dict[str, Callable[[], object]]:
        """Return what is interrupted; all begin with START tokens in both sessions."""
        session, pair = self.session, [self.session, self.other]
        return {
            "decode": lambda: session.decode(IDS[START]),
            "prefill": lambda: session.prefill(IDS[START:24]),
            "together": lambda: Session.decode_together(pair, [IDS[START]] * 2),
            "score": lambda: session.score(IDS[START : START + 9]),
            "snapshot": session.snapshot,
            "restore": lambda: session.restore(self.saved[1]),
            "reset": session.reset,
            "record": self.record,
            "open": lambda: self.model.session(64).close(),
            "generate": lambda: self.model.generate([1], 2, temperature=0, stop_ids=[]),
        }

    def record(self) -> None:
        with self.model.record():
            self.session.decode(IDS[START])

    def begin(self) -> None:
        faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
        for session in (self.session, self.other):
            session.restore(self.saved[0])

    def check(self, what: object) -> None:
        """Raise AssertionError unless sessions say that they are undefined or hold what they should."""
        for session in (self.session, self.other):
            try:
                length = session.length
                got = session.decode(NEXT)
            except OptionError as error:
                assert "undefined" in str(error), (what, error)
                session.restore(self.saved[0])
                length, got = START, session.decode(NEXT)
            assert np.array_equal(got, self.wanted(length)), (what, length)


def interrupt_randomly(subject: Subject, seed: int, times: int) -> int:
    """Return how many alarms raised within an operation: `times`, or fewer if nine of ten came too late."""

    def handle(*_: object) -> None:
        if is_armed:
            raise KeyboardInterrupt

    is_armed = False
    signal.signal(signal.SIGALRM, handle)
    choose, interrupted = random.Random(seed), 0
    seconds: dict[str, float] = {}
    for name, operation in subject.operations().items():
        subject.begin()
        begin = time.perf_counter()
        operation()
        seconds[name] = time.perf_counter() - begin
    for number in range(MOST_ALARMS * times):
        if interrupted == times:
            break
        name = choose.choice(list(seconds))
        operation = subject.operations()[name]
        subject.begin()
        moment = 1e-6 + choose.uniform(0, 1.5 * seconds[name])
        try:
            is_armed = True
            signal.setitimer(signal.ITIMER_REAL, moment)
            operation()
            is_armed = False
        except KeyboardInterrupt:
            interrupted += 1
            is_armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        subject.check((name, number))
    return interrupted


def interrupt_everywhere(subject: Subject, seed: int, step: int) -> int:
    """Return how often an operation was interrupted: by a signal at each `step`-th bytecode, in `decode` at each."""
    interrupted = 0
    for name, operation in subject.operations().items():
        # Of the step that all others are made of, each instant.
        stride = 1 if name == "decode" else step
        subject.begin()
        operation()  # what is made on first use is there
        for number in count(1 + seed % stride, stride):
            for _ in range(TRIES):
                subject.begin()
                signalled = Signalled(operation, number)
                signalled.run()
                subject.check((name, number))
                if signalled.has_raised or signalled.bytecodes < number:
                    break
            interrupted += signalled.has_raised
            if signalled.bytecodes < number:
                break
    return interrupted


class Signalled:
    """Run an operation with a signal that becomes pending before a bytecode; Python sees to it at its next look.

    A tracer cannot raise in its place: Python looks for signals at some bytecodes only, and those are the promise. The alarm
    comes while the tracer does what runs no handler, then the tracer returns without a look.
    """

    DELAY_SECONDS = 2e-4
    HAYSTACK: ClassVar = [0] * 100_000  # a search in vain takes much longer

    def __init__(self, operation: Callable[[], object], number: int) -> None:
        self._operation, self._number = operation, number
        self.bytecodes = 0
        self.is_armed = self.has_raised = False

    def run(self) -> None:
        signal.signal(signal.SIGALRM, self._handle)
        try:
            sys.settrace(self._trace)
            self._operation()
            sys.settrace(None)
            self.is_armed = False
        except KeyboardInterrupt:
            self.has_raised = True
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        frame.f_trace_opcodes = True
        if event != "opcode":
            return self._trace
        self.bytecodes += 1
        if self.bytecodes != self._number:
            return self._trace
        haystack = self.HAYSTACK
        sys.settrace(None)
        self.is_armed = True
        signal.setitimer(signal.ITIMER_REAL, self.DELAY_SECONDS)
        1 in haystack  # noqa: B015

    def _handle(self, _: int, frame: FrameType | None) -> None:
        is_early = frame is not None and frame.f_code is Signalled._trace.__code__
        if self.is_armed and not is_early:
            self.is_armed = False
            raise KeyboardInterrupt


MODES = {"random": interrupt_randomly, "every": interrupt_everywhere}

if __name__ == "__main__":
    place, mode, seed, figure = sys.argv[1:]
    print(MODES[mode](Subject(place), int(seed), int(figure)))
