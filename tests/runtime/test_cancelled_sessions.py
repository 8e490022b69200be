"""A session that a stream continues holds what was generated, however the stream ends."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.errors import ExecutionError, OptionError
from tests.fake_artifact import GENERATION, write_fake


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    """A model whose every token depends on the whole past."""
    path = tmp_path_factory.mktemp("cancelled") / "m.q35c"
    write_fake(path, noise=8.0, generation={**GENERATION, "stop_ids": []}, failing_token=200)
    with q35c.load(path, threads=1) as loaded:
        yield loaded


def take(stream: q35c.runtime.Stream, count: int) -> None:
    for _ in range(count):
        next(stream, None)


@pytest.mark.parametrize("count", range(9))
@pytest.mark.parametrize("way", ["close", "drop", "break"])
def test_a_cancelled_stream_leaves_no_token_out(model: q35c.Model, count: int, way: str) -> None:
    prompt, next_turn = [1, 2, 3], [9, 8]
    whole = model.generate(prompt, 7, temperature=0)
    with model.session() as session:
        stream = model.generate(prompt, 7, temperature=0, session=session, stream=True)
        take(stream, count)
        made = list(stream.result.ids)
        if way == "close":
            stream.close()
            stream.close()
        del stream
        gc.collect()
        assert tuple(made) == whole.ids[: len(made)]
        assert session.length == (len(prompt) + len(made) if made else 0)
        if made:
            with model.session() as other:
                other.prefill([*prompt, *made])
                want = other.prefill(next_turn)
            assert np.array_equal(session.prefill(next_turn), want)


def test_closing_at_the_last_piece_gives_the_session_back(model: q35c.Model) -> None:
    stream = model.generate([1, 2], 3, temperature=0, stream=True)
    take(stream, 3)  # the row has ended, and nobody has asked for more
    stream.close()
    gc.collect()
    assert len(model._budget._live) == 0


def test_what_was_closed_before_the_stream_is_left_alone(model: q35c.Model, tmp_path: Path) -> None:
    with model.session() as session:
        stream = model.generate([1, 2], 9, session=session, stream=True)
        take(stream, 2)
    stream.close()
    write_fake(tmp_path / "m")
    other = q35c.load(tmp_path / "m", threads=1)
    stream = other.generate([1, 2], 9, session=other.session(), stream=True, stop_ids=[])
    take(stream, 2)
    other.close()
    stream.close()
    assert stream.result.finish_reason == "cancelled"


def test_a_full_context_has_no_room_for_the_last_token(model: q35c.Model) -> None:
    with model.session(context=6) as session:
        stream = model.generate([1, 2, 3], 9, session=session, stream=True)
        take(stream, 4)
        stream.close()
        assert (session.length, len(stream.result.ids)) == (6, 4)


def test_a_failed_step_is_not_made_up_for(model: q35c.Model) -> None:
    with model.session() as session:
        with pytest.raises(ExecutionError):
            model.generate([200], 3, session=session)
        assert session.length == 0 and not session.is_usable
        session.reset()
        assert session.is_usable


def test_a_stream_belongs_to_one_thread_at_a_time(model: q35c.Model) -> None:
    entered, leave = threading.Event(), threading.Event()

    stream = model.generate([1, 2], 5, stream=True)

    def pieces() -> Iterator[tuple[int, str]]:
        entered.set()
        leave.wait(60)
        yield 0, "x"

    stream._pieces = pieces()  # type: ignore[assignment]
    thread = threading.Thread(target=take, args=(stream, 1))
    thread.start()
    assert entered.wait(60)
    for use in (stream.__next__, stream.close):
        with pytest.raises(OptionError, match="another thread"):
            use()
    leave.set()
    thread.join(60)
