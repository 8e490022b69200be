"""Ctrl-C ends a part of a command, once."""

from __future__ import annotations

import signal
import threading

import pytest

from q35c.cli.signals import interrupting_once


def test_only_the_first_interrupt_counts() -> None:
    before = signal.getsignal(signal.SIGINT)
    tidied = False
    with pytest.raises(KeyboardInterrupt), interrupting_once():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            tidied = True
    assert tidied and signal.getsignal(signal.SIGINT) is before
    with interrupting_once():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_who_ignores_interrupts_goes_on_to() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupting_once():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), list[object]()

    def look() -> None:
        with interrupting_once():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]
