"""Progress of long jobs, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
import threading

import pytest

from q35c.progress import Progress, clock_text, describe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_short_job_is_silent() -> None:
    for stream in (io.StringIO(), Terminal()):
        clock = Clock()
        with Progress(stream, clock) as progress:
            for step in range(20):
                clock.now += 0.099
                progress("work", step / 20)
        assert stream.getvalue() == ""


def test_plain_lines_for_each_stage_and_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock) as progress:
        progress("read", 0.0)
        for second in range(1, 41):
            clock.now += 1.0
            progress("read" if second < 5 else "weights", 0.0 if second < 5 else (second - 5) / 35)
    assert stream.getvalue().splitlines() == [
        "read  0:02 so far",
        "weights",
        "weights  29 %  0:25 left",
        "weights  57 %  0:15 left",
        "weights  86 %  0:05 left",
    ]


def test_a_terminal_gets_one_line_that_is_wiped() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock) as progress:
        clock.now += 3.0
        progress("weights", 0.0)
        clock.now += 1.0
        progress("weights", 0.25)
        progress("weights", 0.26)  # too soon to be drawn
    wipe = "\r\x1b[K"
    assert stream.getvalue() == f"{wipe}weights{wipe}weights  25 %  0:03 left{wipe}"


def test_a_stage_that_reports_nothing_shows_its_time() -> None:
    for stream, every in ((Terminal(), 1), (io.StringIO(), 10)):
        clock = Clock()
        with Progress(stream, clock) as progress:
            progress.tick()  # no stage yet
            progress("trace", 0.0)
            for _ in range(22):
                clock.now += 1.0
                progress.tick()
        shown = [f"trace  {clock_text(second)} so far" for second in range(2, 23, every)]
        assert [line for line in re.split(r"[\r\n]|\x1b\[K", stream.getvalue()) if line] == shown
        clock.now += 60.0
        progress.tick()
        assert "1:" not in stream.getvalue()  # nothing is drawn after the end


def test_a_thread_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q35c.progress._TICK_SECONDS", 0.001)
    ticked = threading.Event()
    with Progress(io.StringIO()) as progress:
        monkeypatch.setattr(progress, "tick", ticked.set)
        assert ticked.wait(120)


@pytest.mark.parametrize(
    ("fraction", "elapsed", "text"),
    [
        (0.0, 0.9, "pack"),
        (0.0, 9.0, "pack  0:09 so far"),
        (0.005, 9.0, "pack  0 %"),
        (0.5, 0.1, "pack  50 %"),
        (0.5, 62.0, "pack  50 %  1:02 left"),
        (1.0, 62.0, "pack  100 %"),
        (1.5, 62.0, "pack  100 %"),
    ],
)
def test_describe(fraction: float, elapsed: float, text: str) -> None:
    assert describe("pack", fraction, elapsed) == text


def test_clock_text() -> None:
    assert [clock_text(seconds) for seconds in (0.4, 59.6, 3725.0)] == ["0:00", "1:00", "1:02:05"]
