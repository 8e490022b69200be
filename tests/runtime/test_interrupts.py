"""After an exception of a signal handler, at any instant, a model and its sessions go on with the right bits."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.errors import OptionError
from q35c.runtime.cpu.library import Arguments, Workers
from q35c.runtime.session import Session
from tests.fake_artifact import write_fake
from tests.shares import StandIn

ROOT = Path(__file__).parents[2]
NOWHERE = Arguments(0, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("interrupts") / "m.q35c"
    write_fake(place)
    return place


@pytest.fixture
def alarm() -> Iterator[None]:
    """Let SIGALRM raise KeyboardInterrupt."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupt(path: Path, mode: str, seed: int, figure: int) -> int:
    """Return how often the child's operations were interrupted; it checks the rest itself."""
    command = [sys.executable, "-m", "tests.interrupting", path, mode, str(seed), str(figure)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_interrupts_at_random(path: Path) -> None:
    assert interrupt(path, "random", 1, 100) == 100


def test_interrupts_at_every_look_for_signals(path: Path) -> None:
    assert interrupt(path, "every", 1, 50) > 500


@pytest.mark.slow
def test_many_interrupts_at_random(path: Path) -> None:
    assert interrupt(path, "random", 2, 2000) == 2000


@pytest.mark.slow
@pytest.mark.nightly
def test_interrupts_everywhere(path: Path) -> None:
    assert interrupt(path, "every", 1, 1) > 5000


def test_no_thread_runs_on_after_an_interrupt(alarm: None) -> None:
    """The interrupted run's worker has ended when the exception comes out, and its result is not the next run's."""
    workers, ended = Workers(2), []

    def slow(tid: int) -> int:
        if tid == 1:
            time.sleep(0.1)
            ended.append(tid)
        return 5 * tid

    with pytest.raises(KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.02)  # thread 0 waits then
        workers.run(StandIn(slow), NOWHERE)
    assert ended == [1]
    workers.run(StandIn(lambda tid: 0), NOWHERE)


def test_waiting_for_another_step_can_be_interrupted(alarm: None) -> None:
    workers, leave, entered = Workers(2), threading.Event(), threading.Event()
    share = StandIn(lambda tid: entered.set() or (0 if leave.wait(30) else 1))
    other = threading.Thread(target=workers.run, args=(share, NOWHERE))
    other.start()
    assert entered.wait(30)
    with pytest.raises(KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        workers.run(StandIn(lambda tid: 0), NOWHERE)
    leave.set()
    other.join()
    workers.run(StandIn(lambda tid: 0), NOWHERE)


@pytest.mark.parametrize(("entry", "count"), [("prefill", 1), ("decode", 1), ("decode", 3)])
def test_memory_stays_while_a_step_runs(path: Path, entry: str, count: int) -> None:
    """Whoever closes a session that another thread's step uses takes nothing from under it."""
    with q35c.load(path, threads=2) as model:
        sessions = [model.session(64) for _ in range(count)]
        regions = [weakref.ref(session.state) for session in sessions]
        alive: list[bool] = []

        def close_all(tid: int) -> int:
            if tid == 1:
                for session in sessions:
                    session.close()
                gc.collect()
                alive.extend(region() is not None for region in regions)
            return 0

        model._executor.device._entries[entry] = StandIn(close_all)  # type: ignore[assignment]
        if entry == "prefill":
            sessions[0].prefill([1])
        else:
            Session.decode_together(sessions, [1] * count)
        assert alive == [True] * count
        assert [region() for region in regions] == [None] * count


def test_an_interrupted_session_is_undefined_until_it_is_mended(path: Path, alarm: None) -> None:
    with q35c.load(path, threads=1) as model, model.session(64) as session:
        session.prefill([1, 2])
        saved, good = session.snapshot(), model._executor.device._entries["decode"]
        want = session.decode(3)

        def strike(tid: int) -> int:
            signal.raise_signal(signal.SIGALRM)
            return 0

        for mend in (lambda: session.restore(saved), session.reset):
            session.restore(saved)
            model._executor.device._entries["decode"] = StandIn(strike)  # type: ignore[assignment]
            with pytest.raises(KeyboardInterrupt):
                session.decode(3)
            model._executor.device._entries["decode"] = good
            for call in (lambda: session.decode(3), session.snapshot):
                with pytest.raises(OptionError, match="undefined"):
                    call()
            mend()
            if not session.length:
                session.prefill([1, 2])
            assert np.array_equal(session.decode(3), want)
