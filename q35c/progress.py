"""Show how far a long job is: a line that redraws itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_QUIET_SECONDS = 2.0  # a job that ends sooner says nothing
_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 10.0  # between two plain lines of one stage
_TICK_SECONDS = 1.0  # a stage that reports nothing still shows that it lasts


class Progress:
    """Report a job as (stage, fraction of the stage done); call it as often as you like.

    Silent for the first two seconds. Use it as a context manager: a thread then shows the time that
    passes between two calls, and the line is cleared at the end.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._clock = clock
        self._is_terminal = self._stream is not None and self._stream.isatty()
        self._started = self._stage_started = clock()
        self._stage, self._fraction = "", 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._shown_at = 0.0
        self._shown_stage: str | None = None
        self._has_line = False

    def __enter__(self) -> Progress:
        threading.Thread(target=self._run, name="q35c-progress", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self.clear()

    def __call__(self, stage: str, fraction: float) -> None:
        """Take note of the job's state; a fraction of 0 throughout stands for "unknown"."""
        with self._lock:
            if stage != self._stage:
                self._stage, self._stage_started = stage, self._clock()
            self._fraction = fraction
            self._refresh()

    def tick(self) -> None:
        """Show the time that has passed since the last call."""
        with self._lock:
            if self._stage and not self._ended.is_set():
                self._refresh()

    def clear(self) -> None:
        """Wipe the line from the terminal; the next call draws it again."""
        with self._lock:
            if self._has_line:
                self._write("\r\x1b[K")
                self._has_line = False

    def _run(self) -> None:
        while not self._ended.wait(_TICK_SECONDS):
            self.tick()

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._started < _QUIET_SECONDS:
            return
        wait = _REDRAW_SECONDS if self._is_terminal else _LINE_SECONDS
        if self._stage == self._shown_stage and now - self._shown_at < wait:
            return
        self._shown_at, self._shown_stage = now, self._stage
        self._show(describe(self._stage, self._fraction, now - self._stage_started))

    def _show(self, text: str) -> None:
        if self._is_terminal:
            # A line that wraps could not be redrawn.
            self._write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
            self._has_line = True
        else:
            self._write(text + "\n")

    def _write(self, text: str) -> None:
        """Write to the stream while it can be written to: a job does not end because nobody watches."""
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # closed, full, or nobody reads
            self._stream = None


def describe(stage: str, fraction: float, elapsed: float) -> str:
    """Return one line, such as `weights  43 %  1:02 left`, or `trace  0:09 so far` where the
    fraction is unknown; `elapsed` is in seconds."""
    if fraction <= 0.0:
        return f"{stage}  {clock_text(elapsed)} so far" if elapsed >= 1.0 else stage
    fraction = min(fraction, 1.0)
    line = f"{stage}  {100 * fraction:.0f} %"
    # The first percent, or the first moment, says nothing about the pace.
    if 0.01 <= fraction < 1.0 and elapsed >= 0.5:
        line += f"  {clock_text(elapsed * (1.0 - fraction) / fraction)} left"
    return line


def clock_text(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
