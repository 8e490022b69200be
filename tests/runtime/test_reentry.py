"""What the garbage collector or a signal handler calls in the midst of a step, on the same thread, never waits for that step."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import q35c
from q35c.errors import OptionError
from q35c.runtime.session import Session
from tests.fake_artifact import GENERATION, write_fake

PATIENCE_SECONDS = 60
PROMPT, NEXT = [1, 2, 3], [9, 8]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reentry") / "m.q35c"
    write_fake(place, noise=8.0, generation={**GENERATION, "stop_ids": []})
    return place


@pytest.fixture
def model(path: Path) -> Iterator[q35c.Model]:
    with q35c.load(path, threads=1) as loaded:
        yield loaded


@pytest.fixture
def only_asked() -> Iterator[None]:
    """Collect garbage only where a test asks for it, and look at new objects only."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def within_patience(work: Callable[[], object]) -> None:
    """Do something on a thread of its own, which may hang."""
    found: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            found.append(None)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert found, "it waits for itself"
    if found[0] is not None:
        raise found[0]


def at_line(
    number: int, act: Callable[[], object], operation: Callable[[], Any]
) -> tuple[Any, bool]:
    """Run an operation, and `act` before its line of that number; return the result, and whether there was one."""
    left = number

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if event == "line" and "q35c" in frame.f_code.co_filename:
            left -= 1
            if left == 0:
                sys.settrace(None)
                act()
        return trace

    sys.settrace(trace)
    try:
        return operation(), left <= 0
    finally:
        sys.settrace(None)


def drop_into_a_circle(model: q35c.Model, session: Session) -> list[int]:
    """Leave a stream to the garbage collector; return what it has generated."""
    stream = model.generate(PROMPT, 7, temperature=0, session=session, stream=True)
    for _ in range(3):
        next(stream)
    made = list(stream.result.ids)
    circle: list[Any] = [stream]
    circle.append(circle)
    return made


OPERATIONS = ["decode", "prefill", "score", "open", "generate"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_stream_may_be_collected_at_any_line(
    model: q35c.Model, only_asked: None, name: str
) -> None:
    def work() -> None:
        with model.session(64) as session, model.session(64) as other, model.session(64) as fresh:
            operation: Callable[[], Any] = {
                "decode": lambda: other.decode(5),
                "prefill": lambda: other.prefill(PROMPT),
                "score": lambda: other.score(PROMPT),
                "open": lambda: model.session(64).close(),
                "generate": lambda: model.generate(PROMPT, 2, temperature=0).ids,
            }[name]
            wanted = operation()
            for number in count(1):
                for each in (session, other, fresh):
                    each.reset()
                made = drop_into_a_circle(model, session)
                got, was_there = at_line(number, gc.collect, operation)
                assert np.array_equal(got, wanted) or got is wanted is None
                if not was_there:
                    break
                fresh.prefill([*PROMPT, *made])
                assert session.length == len(PROMPT) + len(made)
                assert np.array_equal(session.prefill(NEXT), fresh.prefill(NEXT)), number
            assert number > 10

    within_patience(work)


@pytest.mark.parametrize("use", ["decode", "open", "score"])
def test_a_handler_may_use_the_model_at_any_line(model: q35c.Model, use: str) -> None:
    """A step within a step is refused; what makes none is done."""

    def work() -> None:
        refusals: list[str] = []

        def act() -> None:
            # It is caught here: a handler can raise at fewer places than the tracer that stands in for it.
            try:
                {
                    "decode": lambda: other.decode(5),
                    "open": lambda: model.session(64).close(),
                    "score": lambda: model.score([1]),
                }[use]()
            except OptionError as error:
                refusals.append(str(error))

        with model.session(64) as session, model.session(64) as other:
            wanted = session.prefill(PROMPT)
            for number in count(1):
                session.reset()
                other.reset()
                got, was_there = at_line(number, act, lambda: session.prefill(PROMPT))
                assert np.array_equal(got, wanted)
                if not was_there:
                    break
        assert all("in the midst of a step" in refusal for refusal in refusals)
        assert (len(refusals) > 5) == (use != "open")

    within_patience(work)


def test_a_handler_may_close_the_model_at_any_line(path: Path) -> None:
    def work() -> None:
        wanted = None
        for number in count(1):
            model = q35c.load(path, threads=2)
            session = model.session(64)
            try:
                got, was_there = at_line(number, model.close, partial(session.prefill, PROMPT))
            except OptionError as error:
                assert "closed" in str(error)
                continue
            wanted = got if wanted is None else wanted
            assert np.array_equal(got, wanted)
            if not was_there:
                model.close()
                break
            with pytest.raises(OptionError, match="closed"):
                session.decode(1)

    within_patience(work)
