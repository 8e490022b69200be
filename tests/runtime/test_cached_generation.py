"""`Model.cache`: generating with what is kept of earlier prompts says what it says without."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import q35c
from q35c.errors import MemoryRefused, OptionError
from q35c.runtime import memory
from tests.fake_artifact import IM_END, write_with_messages
from tests.prompts import conversations

START = IM_END
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3, "stop_ids": []}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cached") / "m.q35c"
    write_with_messages(place)
    return place


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[q35c.Model]:
    with q35c.load(path, threads=1) as loaded:
        yield loaded


PROMPTS = list(conversations(2, 30, vocab=250, start=START, most=1500))


def test_answers_are_the_same(model: q35c.Model) -> None:
    cache = model.cache(1 << 28)
    for ids in PROMPTS:
        want = model.generate(ids, **OPTIONS)
        got = model.generate(ids, cache=cache, **OPTIONS)
        assert got.ids == want.ids and got == want
        assert "".join(model.generate(ids, cache=cache, stream=True, **OPTIONS)) == want
    assert cache.parked_bytes > 0
    cache.close()
    assert cache.parked_bytes == 0


def test_several_prompts_at_once(model: q35c.Model) -> None:
    cache = model.cache(1 << 28)
    want = model.generate(PROMPTS, **OPTIONS)
    for _ in range(2):
        got = model.generate(PROMPTS, cache=cache, **OPTIONS)
        assert [made.ids for made in got] == [made.ids for made in want]
    cache.close()


def test_the_second_time_most_is_there(model: q35c.Model) -> None:
    cache, ids = model.cache(1 << 28), max(PROMPTS, key=len)
    model.generate(ids, cache=cache, **OPTIONS)
    with model.record() as runs:
        model.generate(ids, cache=cache, **OPTIONS)
    assert sum(run.tokens for run in runs if run.entry != "decode") < 140 < len(ids)
    cache.close()


def test_threads_share_a_cache(model: q35c.Model) -> None:
    cache, found = model.cache(1 << 22), dict[int, Any]()

    def work(first: int) -> None:
        for at in range(first, len(PROMPTS), 3):
            found[at] = model.generate(PROMPTS[at], cache=cache, **OPTIONS).ids

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at] for at in range(len(PROMPTS))] == [
        model.generate(ids, **OPTIONS).ids for ids in PROMPTS
    ]
    cache.close()


def test_a_closed_stream_gives_its_session_back(model: q35c.Model) -> None:
    cache, ids = model.cache(1 << 28), max(PROMPTS, key=len)
    stream = model.generate(ids, cache=cache, stream=True, max_new_tokens=100)
    next(stream)
    assert len(cache._lent) == 1
    stream.close()
    assert not cache._lent and len(cache._parked) == 1
    cache.close()


def test_wrong_caches(model: q35c.Model, path: Path) -> None:
    with q35c.load(path, threads=1) as other, pytest.raises(OptionError, match="another model"):
        other.generate([1], cache=model.cache(0))
    with model.session() as session, pytest.raises(OptionError, match="its own beginning"):
        model.generate([1], session=session, cache=model.cache(0))
    for bad in (5, "cache", object()):
        with pytest.raises(OptionError):
            model.generate([1], cache=bad)
    for bad in (-1, 1.5, "1GB"):
        with pytest.raises(OptionError) as caught:
            model.cache(bad)
        assert caught.value.where == "max_bytes"
    assert 0 < model.cache().max_bytes < memory.available_memory().bytes


def test_what_is_kept_gives_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short, an answer counts more than what might be asked next."""
    with q35c.load(path, threads=1) as model:
        cache, ids = model.cache(1 << 28), max(PROMPTS, key=len)
        model.generate(ids, cache=cache, **OPTIONS)
        other = np.roll(ids, 1).tolist()

        def have() -> memory.Available:
            return memory.Available(0 if cache.parked_bytes else 2**40, "test")

        monkeypatch.setattr(model._budget, "_available", have)
        assert model.generate(other, cache=cache, **OPTIONS).ids
        assert cache.evictions == 1
        monkeypatch.setattr(model._budget, "_available", lambda: memory.Available(0, "test"))
        with pytest.raises(MemoryRefused):
            model.generate(ids, cache=cache, **OPTIONS)
        cache.close()
