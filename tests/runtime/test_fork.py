"""A forked child is told that a model does not survive a fork, whatever its parent's threads were doing."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import q35c
from q35c.errors import OptionError
from q35c.runtime.session import Session
from tests.fake_artifact import write_fake

GIVE_UP_SECONDS = 30  # the alarm ends a child that hangs


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fork") / "m.q35c"
    write_fake(place)
    return place


def in_child(call: Callable[[], object]) -> str:
    """Return how a call ended in a forked child: "done" or the error's type and text."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that this process has threads
        pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(GIVE_UP_SECONDS)
        try:
            call()
            ended = "done"
        except BaseException as error:
            ended = f"{type(error).__name__}: {error}"
        os.write(writing, ended.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        ended = pipe.read()
    _, status = os.waitpid(pid, 0)
    return ended if status == 0 else f"ended by {status}"


def record(model: q35c.Model) -> None:
    with model.record():
        pass


def use(model: Any, session: Session, snapshot: Any) -> dict[str, Callable[[], object]]:
    probe = model.manifest.probes[0]
    return {
        "decode": lambda: session.decode(1),
        "decode_together": lambda: Session.decode_together([session], [1]),
        "prefill": lambda: session.prefill([1]),
        "score": lambda: session.score([1]),
        "snapshot": session.snapshot,
        "restore": lambda: session.restore(snapshot),
        "reset": session.reset,
        "session": model.session,
        "model.score": lambda: model.score([1]),
        "generate text": lambda: model.generate("a", 1),
        "generate ids": lambda: model.generate([1], 1),
        "stream": lambda: model.generate([1], 1, stream=True),
        "go on with a stream": lambda: next(model.generate([1], 1, stream=True)),
        "tokenizer": lambda: model.tokenizer,
        "apply_chat_template": lambda: model.apply_chat_template([]),
        "record": lambda: record(model),
        "run_probe": lambda: model.run_probe(probe, session.state.address, 1),
    }


@pytest.mark.parametrize("threads", [1, 2])
def test_every_use_is_refused_though_all_locks_are_held(path: Path, threads: int) -> None:
    with (
        q35c.load(path, threads=threads) as model,
        model.session(64) as session,
        ExitStack() as held,
    ):
        snapshot = session.snapshot()
        executor = model._executor
        for lock in (
            executor._lock,
            executor.device._workers._lock,
            model._budget._lock,
            model._lazy,
        ):
            held.enter_context(lock)
        for name, call in use(model, session, snapshot).items():
            ended = in_child(call)
            assert ended.startswith("OptionError") and "fork" in ended, (name, ended)
            assert "load the model in the child" in ended
        assert in_child(session.close) == "done"
        assert in_child(model.close) == "done"


def test_inherited_objects_are_dropped_without_a_trace(path: Path) -> None:
    """Neither closing nor collecting them in a child hangs it or takes anything from the parent."""
    with q35c.load(path, threads=2) as model, model.session(64) as session:
        want = session.prefill([1, 2, 3])
        held = {"model": model, "session": session}

        def drop() -> None:
            held["session"].close()
            held["model"].close()
            held.clear()

        with model._executor._lock, model._budget._lock:
            assert in_child(drop) == "done"
        session.reset()
        assert np.array_equal(session.prefill([1, 2, 3]), want)


def test_a_child_loads_its_own_model(path: Path) -> None:
    with q35c.load(path, threads=2) as model:
        want = model.score([1, 2, 3])

        def own() -> None:
            with q35c.load(path, threads=2) as mine:
                assert np.array_equal(mine.score([1, 2, 3]), want)
                assert "fork" in in_child(lambda: mine.score([1]))

        assert in_child(own) == "done"


def test_a_fork_beside_a_running_step(path: Path) -> None:
    with q35c.load(path, threads=2) as model, model.session(64) as session:
        want, stop = session.prefill([1, 2, 3]), threading.Event()

        def work() -> None:
            with model.session() as other:
                while not stop.is_set():
                    other.prefill(list(range(100)))
                    other.reset()

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for _ in range(10):
                assert in_child(lambda: session.decode(1)).startswith("OptionError")
        finally:
            stop.set()
            worker.join()
        session.reset()
        assert np.array_equal(session.prefill([1, 2, 3]), want)


def test_a_closed_model_refuses_every_use(path: Path) -> None:
    model = q35c.load(path, threads=2)
    session = model.session(64)
    snapshot = session.snapshot()
    model.close()
    for name, call in use(model, session, snapshot).items():
        with pytest.raises(OptionError, match="closed"):
            call()
            raise AssertionError(name)
    session.close()
    for call in (lambda: session.decode(1), session.snapshot, session.reset):
        with pytest.raises(OptionError, match="closed"):
            call()
