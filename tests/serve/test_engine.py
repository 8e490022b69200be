"""The engine from outside: what is asked from other threads, and the events that come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import q35c
from q35c.errors import ExecutionError, OptionError, Overloaded, PromptError, Unavailable
from q35c.runtime.session import Session
from q35c.serve.engine import Engine
from q35c.serve.request import Failed, Finished, Scored, Started, Token
from tests.fake_artifact import END, VOCAB, script, write_fake
from tests.serve.talk import SECONDS, Answer, ask, request

CONTEXT, FAILING = 1024, 99


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    place = tmp_path_factory.mktemp("engine") / "m.q35c"
    write_fake(place, failing_token=FAILING, context=CONTEXT)
    with q35c.load(place, threads=1) as loaded:
        yield loaded


@pytest.fixture
def engine(model: q35c.Model) -> Iterator[Engine]:
    made = Engine(model)
    yield made
    made.close()
    assert made.statistics().running == made.statistics().waiting == 0


def random_ids(count: int, seed: int = 0) -> list[int]:
    ids = np.random.default_rng(seed).integers(0, 250, count)
    return np.where(ids == FAILING, 0, ids).tolist()


def sampled(**options: Any) -> dict[str, Any]:
    """Return options that never sample the token that breaks a step."""
    return {"temperature": 1.0, "logit_bias": {FAILING: -1000}, **options}


def test_an_answer_is_what_generate_says(engine: Engine, model: q35c.Model) -> None:
    for seed, count in enumerate((1, 63, 64, 65, 200)):
        ids = random_ids(count, seed)
        (answer,) = ask(engine, request(ids, 20, **sampled(seed=seed)))
        want = model.generate(ids, 20, seed=seed, stop_ids=[], **sampled())
        assert tuple(answer.ids) == want.ids and answer.text == want.text
        assert answer.events[0] == Started(0)
        assert isinstance(answer.last, Finished) and answer.last.reason == "length"
        usage = answer.last.usage
        assert (usage.prompt_tokens, usage.cached_tokens, usage.new_tokens) == (count, 0, 20)


def test_many_at_once_get_what_each_gets_alone(engine: Engine) -> None:
    requests = [
        request(random_ids(1 + 37 * i % 150, i), 5 + i % 7, **sampled(seed=i, client=str(i % 3)))
        for i in range(20)
    ]
    alone = [ask(engine, item)[0] for item in requests]
    together = ask(engine, *requests)
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    statistics = engine.statistics()
    assert max(statistics.rows) > 1
    assert statistics.generated_tokens == 2 * sum(5 + i % 7 for i in range(20))


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    place = tmp_path_factory.mktemp("engine") / "s.q35c"
    write_fake(place, bigram=script("abcdé!"), noise=0.1)
    with q35c.load(place, threads=1) as loaded:
        yield loaded


def test_stops(scripted: q35c.Model) -> None:
    engine = Engine(scripted)
    plain, by_text, by_id, cut = ask(
        engine,
        request(b"a", 10, stop_ids=[END]),
        request(b"a", 10, stop=["dé"]),
        request(b"a", 10, stop_ids=[ord("d")]),
        request(b"a", 4, stop_ids=[END]),
    )
    engine.close()
    assert plain.text == "bcdé!" and plain.tokens[-1] == Token(END, "")
    assert plain.last.stop == END and plain.last.usage.new_tokens == len("bcdé!".encode()) + 1
    assert by_text.text == "bc" and by_text.last.stop == "dé" and by_text.last.reason == "stop"
    assert by_id.text == "bc" and by_id.last.stop == ord("d")
    assert cut.text == "bcd\ufffd" and cut.last.reason == "length" and cut.last.stop is None


def test_logprobs(engine: Engine, model: q35c.Model) -> None:
    ids = random_ids(70)
    (answer,) = ask(engine, request(ids, 3, logprobs=2, logit_bias={7: 500.0}))
    with model.session() as session:
        logits = session.prefill(ids)
        for token in answer.tokens:
            assert token.id == 7
            shares = np.log(np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum())
            assert token.logprob == pytest.approx(shares[7], abs=1e-5)  # before the bias
            best = np.argsort(-shares)[:2]
            assert [at for at, _ in token.top] == best.tolist()
            logits = session.decode(7)


def test_scoring(engine: Engine, model: q35c.Model) -> None:
    for count in (1, 2, 64, 65, 130):
        ids = random_ids(count, count)
        first, then = ask(
            engine,
            request(ids, 0, logprobs=1, is_scoring=True),
            request(ids, 2, logprobs=1, is_scoring=True),
        )
        scored = first.events[1]
        assert isinstance(scored, Scored) and scored == then.events[1]
        assert len(first.events) == 3 and first.last.reason == "length"
        assert [token.id for token in scored.tokens] == ids
        assert scored.tokens[0].logprob is None
        logits = model.score(ids).astype(float)
        shares = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
        for at, token in enumerate(scored.tokens[1:]):
            assert token.logprob == pytest.approx(shares[at, token.id], abs=1e-5)
            assert token.top[0][0] == shares[at].argmax()
        assert then.ids == ask(engine, request(ids, 2))[0].ids


def test_a_group_is_computed_once(engine: Engine) -> None:
    ids = random_ids(300)
    before = engine.statistics().prefill_slices
    requests = [request(ids, 6, **sampled(seed=i, group="g")) for i in range(3)]
    alone = [ask(engine, request(ids, 6, **sampled(seed=i)))[0].ids for i in range(3)]
    middle = engine.statistics().prefill_slices
    answers = ask(engine, *requests)
    assert [answer.ids for answer in answers] == alone
    assert engine.statistics().prefill_slices - middle == 5 == (middle - before) // 3


def test_requests_that_only_say_they_are_alike(engine: Engine) -> None:
    first, second = random_ids(100, 1), random_ids(100, 2)
    want = [ask(engine, request(ids, 4))[0].ids for ids in (first, second)]
    answers = ask(engine, request(first, 4, group="g"), request(second, 4, group="g"))
    assert [answer.ids for answer in answers] == want


def test_cancelling_anywhere(engine: Engine) -> None:
    for events in (0, 1, 2, 5):
        answer = Answer()
        ticket = engine.submit(request(random_ids(500), 400, **sampled()), answer.post)
        answer.wait(events)
        engine.cancel(ticket)
        answer.wait()
        assert isinstance(answer.last, Finished) and answer.last.reason == "cancelled"
        assert answer.last.usage.new_tokens == len(answer.tokens)
        engine.cancel(ticket)  # it has ended: nothing happens
        assert sum(isinstance(event, Finished) for event in answer.events) == 1
    (after,) = ask(engine, request([1], 3))
    assert len(after.ids) == 3


def test_cancelling_what_waits(engine: Engine) -> None:
    running = [Answer() for _ in range(4)]
    tickets = [engine.submit(request([1], 900, **sampled()), a.post) for a in running]
    waiting = Answer()
    ticket = engine.submit(request([2], 5), waiting.post)
    for answer in running:
        answer.wait(1)
    assert not waiting.events
    engine.cancel(ticket)
    assert isinstance(waiting.wait().last, Finished) and len(waiting.events) == 1
    for item in tickets:
        engine.cancel(item)
    assert [answer.wait().last.reason for answer in running] == ["cancelled"] * 4


def test_a_deadline_is_for_waiting_only(engine: Engine) -> None:
    running = [Answer() for _ in range(4)]
    tickets = [
        engine.submit(request([1], 900, **sampled(deadline=time.monotonic() + 1e6)), a.post)
        for a in running
    ]
    late = Answer()
    engine.submit(request([1], 5, deadline=time.monotonic() - 1.0), late.post)
    assert late.wait().last.reason == "cancelled" and not late.tokens
    assert not any(answer.is_over for answer in running)
    for ticket in tickets:
        engine.cancel(ticket)


def test_too_many_requests(model: q35c.Model) -> None:
    engine = Engine(model, max_queue=2, max_queue_tokens=50)
    running = [Answer() for _ in range(4)]
    for answer in running:
        engine.submit(request([1], 900, **sampled()), answer.post)
        answer.wait(1)
    engine.submit(request([2] * 40), Answer().post)
    with pytest.raises(Overloaded) as caught:
        engine.submit(request([2] * 11), Answer().post)
    assert caught.value.retry_after_seconds >= 1
    engine.submit(request([2] * 10), Answer().post)
    with pytest.raises(Overloaded, match="too many requests"):
        engine.submit(request([2]), Answer().post)
    assert (engine.statistics().waiting, engine.statistics().waiting_tokens) == (2, 50)
    engine.close()
    assert all(answer.is_over for answer in running)


@pytest.mark.parametrize("ids", [[], [VOCAB], [-1], [1] * (CONTEXT + 1)], ids=len)
def test_wrong_prompts(engine: Engine, ids: list[int]) -> None:
    with pytest.raises(PromptError):
        engine.submit(request(ids), Answer().post)


@pytest.mark.parametrize(
    "options",
    [{"batch": 0}, {"batch": 5}, {"max_queue": 0}, {"max_stall": 0}, {"cache_bytes": -1}],
    ids=str,
)
def test_options_are_checked(model: q35c.Model, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        Engine(model, **options)
    assert caught.value.where == next(iter(options))


def test_a_fault_in_a_prompt_is_its_own(engine: Engine) -> None:
    good, bad = ask(engine, request(random_ids(100), 30), request([FAILING, 1], 5))
    assert isinstance(bad.last, Failed) and isinstance(bad.last.error, ExecutionError)
    assert len(good.ids) == 30


def test_a_fault_in_a_step_ends_its_rows_only(engine: Engine) -> None:
    # The fake's step fails when its first row appends this token.
    (bad,) = ask(engine, request([1], 5, logit_bias={FAILING: 1000}))
    assert isinstance(bad.last, Failed) and bad.ids == [FAILING]
    (good,) = ask(engine, request([1], 5))
    assert len(good.ids) == 5


def test_a_fault_of_a_sampler_is_its_rows(engine: Engine) -> None:
    class Broken:
        def matcher(self) -> Broken:
            return self

        def mask(self) -> np.ndarray:
            return np.zeros(-(-VOCAB // 32), np.uint32)

    good, bad = ask(engine, request([1], 30), request([1], 5, constraint=Broken()))
    assert isinstance(bad.last, Failed) and "no token is allowed" in str(bad.last.error)
    assert len(good.ids) == 30
    (bad,) = ask(engine, request([1], 5, constraint=object()))
    assert isinstance(bad.last, Failed) and "AttributeError" in str(bad.last.error)


def test_who_cannot_be_told_is_given_up(engine: Engine) -> None:
    def post(request: Any, events: list[Any]) -> None:
        raise RuntimeError("gone")

    engine.submit(request([1], 900, **sampled()), post)
    (answer,) = ask(engine, request([1], 30))
    assert len(answer.ids) == 30
    engine.drain(SECONDS)  # nothing runs on
    assert engine.statistics().generated_tokens < 900


def test_a_wrong_turn_ends_what_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Session, "length", property(lambda self: 1 / 0), raising=False)
        (answer,) = ask(engine, request([1], 5))
    assert isinstance(answer.last, Failed)
    assert len(ask(engine, request([1], 5))[0].ids) == 5


def test_draining_lets_running_rows_end(model: q35c.Model) -> None:
    engine = Engine(model)
    running = [Answer() for _ in range(4)]
    for answer in running:
        engine.submit(request([1], 100, **sampled()), answer.post)
        answer.wait(1)
    waiting = Answer()
    engine.submit(request([1], 5), waiting.post)
    engine.drain(SECONDS)
    assert [answer.last.reason for answer in running] == ["length"] * 4
    assert isinstance(waiting.last, Failed) and isinstance(waiting.last.error, Unavailable)
    with pytest.raises(Unavailable):
        engine.submit(request([1]), Answer().post)
    engine.close()


def test_draining_cancels_what_does_not_end(model: q35c.Model) -> None:
    engine = Engine(model)
    answer = Answer()
    engine.submit(request([1], 900, **sampled()), answer.post)
    answer.wait(1)
    engine.drain(0)
    assert answer.last.reason == "cancelled"
    engine.close()
    engine.close()
    with pytest.raises(Unavailable):
        engine.submit(request([1]), Answer().post)


def test_closing_ends_thread_and_sessions(model: q35c.Model) -> None:
    before = threading.active_count()
    engine = Engine(model)
    answers = [Answer() for _ in range(9)]
    for answer in answers:
        engine.submit(request(random_ids(200), 600, **sampled()), answer.post)
    answers[0].wait(2)
    engine.close()
    assert threading.active_count() == before
    assert all(isinstance(answer.last, Finished) for answer in answers)
    open_ = [s for s in model._budget._live if not s.is_closed]
    assert open_ == []


def test_an_engine_that_ends_tells_everybody(
    model: q35c.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A panic of a library is no Exception: it ends the thread, but nobody waits for ever."""

    class Panic(BaseException):
        pass

    class Panicking:
        def matcher(self) -> None:
            raise Panic("gone")

    engine = Engine(model)
    answers = [Answer() for _ in range(9)]
    for answer in answers:
        engine.submit(request([1], 900, **sampled()), answer.post)
    answers[0].wait(2)
    last = Answer()
    engine.submit(request([1], constraint=Panicking(), client="new"), last.post)
    for answer in (*answers, last):
        assert isinstance(answer.wait().last, Failed) and "Panic" in str(answer.last.error)
    with pytest.raises(Unavailable):
        engine.submit(request([1]), Answer().post)
    engine.drain(SECONDS)
    engine.close()
    assert [session for session in model._budget._live if not session.is_closed] == []
