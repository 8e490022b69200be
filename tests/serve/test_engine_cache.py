"""The engine with a prefix cache: what clients see of it, and that answers stay what they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain

import numpy as np
import pytest

import q35c
from q35c.runtime.recent import MISS_REASONS
from q35c.serve.engine import Engine
from q35c.serve.request import Failed, Started
from tests.fake_artifact import IM_END, VOCAB, tokenizer, write_fake
from tests.prompts import conversations
from tests.serve.talk import SECONDS, Answer, ask, request

CONTEXT, START = 2048, IM_END


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    """Return a fake whose tokenizer has the token that begins a message."""
    place = tmp_path_factory.mktemp("engine") / "m.q35c"
    document = tokenizer().replace(b"<|im_end|>", b"<|im_start|>")
    write_fake(place, context=CONTEXT, segments={"tokenizer": document})
    with q35c.load(place, threads=1) as loaded:
        assert loaded.tokenizer.token_id("<|im_start|>") == START
        yield loaded


@pytest.fixture
def engine(model: q35c.Model) -> Iterator[Engine]:
    made = Engine(model, cache_bytes=1 << 28)
    yield made
    made.close()
    open_ = [session for session in model._budget._live if not session.is_closed]
    assert open_ == []


def text(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 250, count).tolist()


FIRST = [START, *text(300, 0), START, 5, *text(90, 1), START, 6]


def test_the_second_turn_begins_behind_the_first(engine: Engine) -> None:
    (first,) = ask(engine, request(FIRST, 5))
    (second,) = ask(engine, request([*FIRST, *text(20, 2), START, 5, 7, START, 6], 5))
    assert first.events[0] == Started(0) and second.events[0] == Started(384)
    assert second.last.usage.cached_tokens == 384
    statistics = engine.statistics()
    assert statistics.cached_tokens == 384 and statistics.prefill_slices == 7 + 1
    assert statistics.misses == {**dict.fromkeys(MISS_REASONS, 0), "new": 1}
    assert set(statistics.state_bytes) == {"running", "parked", "cached"}
    assert statistics.state_bytes["parked"] > 0 == statistics.state_bytes["running"]


def test_salts_do_not_share(engine: Engine) -> None:
    found = [
        ask(engine, request(FIRST, 2, salt=salt))[0].last.usage.cached_tokens for salt in "abab"
    ]
    assert found == [0, 0, 384, 384]


def test_a_group_shares_what_is_kept(engine: Engine) -> None:
    (alone,) = ask(engine, request(FIRST, 4, temperature=1.0, seed=3))
    seeds = (1, 2, 3)
    answers = ask(engine, *(request(FIRST, 4, temperature=1.0, seed=s, group="g") for s in seeds))
    assert answers[2].ids == alone.ids
    assert {answer.last.usage.cached_tokens for answer in answers} == {384}
    assert engine.statistics().prefill_slices == 7 + 1


def test_scoring_takes_nothing_from_the_cache(engine: Engine) -> None:
    (first,) = ask(engine, request(FIRST, 0, logprobs=0, is_scoring=True))
    ask(engine, request(FIRST, 2))
    (second,) = ask(engine, request(FIRST, 0, logprobs=0, is_scoring=True))
    assert first.events[1] == second.events[1] and second.last.usage.cached_tokens == 0


def test_a_broken_row_is_not_kept(engine: Engine) -> None:
    class Broken:
        def matcher(self) -> Broken:
            return self

        def mask(self) -> np.ndarray:
            return np.zeros(-(-VOCAB // 32), np.uint32)

    (bad,) = ask(engine, request(FIRST, 2, constraint=Broken()))
    assert isinstance(bad.last, Failed)
    (good,) = ask(engine, request(FIRST, 2))
    assert good.last.usage.cached_tokens == 0


@pytest.mark.parametrize("cache_bytes", [1 << 28, 300_000, 1])
def test_a_busy_server_says_what_an_idle_one_without_cache_says(
    model: q35c.Model, cache_bytes: int
) -> None:
    """Many clients at once, some of which go before their answer has come."""
    rng = np.random.default_rng(4)
    prompts = list(conversations(3, 60, vocab=250, start=START, most=1500))
    requests = [
        request(ids, 6, temperature=1.0, seed=i, client=str(i % 5), salt=str(i % 2))
        for i, ids in enumerate(prompts)
    ]
    plain = Engine(model)
    want = [answer.ids for answer in chain.from_iterable(ask(plain, item) for item in requests)]
    plain.close()
    engine = Engine(model, cache_bytes=cache_bytes)
    answers = [Answer() for _ in requests]
    for item, answer in zip(requests, answers, strict=True):
        ticket = engine.submit(item, answer.post)
        if rng.random() < 0.2:
            answer.wait(int(rng.integers(4)))
            engine.cancel(ticket)
    for answer, ids in zip(answers, want, strict=True):
        answer.wait()
        assert answer.ids == ids[: len(answer.ids)]
        assert answer.last.reason == "cancelled" or answer.ids == ids
    statistics = engine.statistics()
    assert statistics.cached_tokens > 0 or cache_bytes == 1
    engine.drain(SECONDS)
    engine.close()
    assert engine.statistics().state_bytes == {"running": 0, "parked": 0, "cached": 0}


def test_many_cancelled_requests_leave_nothing(engine: Engine, model: q35c.Model) -> None:
    rng = np.random.default_rng(8)
    for index in range(200):
        answer = Answer()
        ids = [START, *text(int(rng.integers(1, 300)), index % 7), START, 6]
        ticket = engine.submit(request(ids, 50, deadline=time.monotonic() + SECONDS), answer.post)
        answer.wait(int(rng.integers(0, 20)))
        engine.cancel(ticket)
        answer.wait()
    statistics = engine.statistics()
    assert statistics.running == statistics.waiting == 0
    parked = len(engine._cache._parked)
    assert len([s for s in model._budget._live if not s.is_closed]) == parked <= 20
