"""What turns do, without a thread: which calls they make, who is next, and what memory and faults do to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import q35c
from q35c.errors import MemoryRefused
from q35c.runtime.prefix import PrefixCache
from q35c.runtime.session import Session
from q35c.serve import turns as turns_file
from q35c.serve.request import Failed, Request
from q35c.serve.schedule import Job, Pace
from q35c.serve.turns import Turns
from tests.fake_artifact import write_fake
from tests.serve.talk import Answer, request

CONTEXT = 1024
Call = tuple[str, int, int]  # entry, start, tokens


class Table:
    """Turns, the answers to what was asked, and the calls that each session has seen."""

    def __init__(self, model: q35c.Model, batch: int = 4, max_stall: float = 1e-9) -> None:
        self.answers: dict[int, Answer] = {}
        self.seated: list[int] = []
        self.turns = Turns(
            model,
            model.tokenizer,
            PrefixCache(model.session, model.manifest, 0),
            Pace(max_stall),
            batch,
            on_seat=lambda job: self.seated.append(job.number),
            on_end=lambda job: None,
        )

    def ask(self, *requests: Request) -> list[Answer]:
        """Let requests wait; return their answers to be."""
        made = []
        for item in requests:
            answer = self.answers[len(self.answers)] = Answer()
            self.turns.add(Job(len(self.answers) - 1, item, answer.post, 0.0))
            made.append(answer)
        return made

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.turns.take_turn(lambda: False)

    def finish(self) -> None:
        for _ in range(10_000):
            if self.turns.is_idle:
                return
            self.turn()
        raise AssertionError("it does not end")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    place = tmp_path_factory.mktemp("turns") / "m.q35c"
    write_fake(place, context=CONTEXT)
    with q35c.load(place, threads=1) as loaded:
        yield loaded


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Call]]:
    """Return the calls that fill prompts, by the prompt's first token."""
    found: dict[int, list[Call]] = {}

    def watch(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(session: Session, ids: Any) -> Any:
            first = int(session.ids[0]) if session.length else ids[0]
            found.setdefault(first, []).append((name, session.length, len(ids)))
            return method(session, ids)

        return call

    for name in ("extend", "prefill"):
        monkeypatch.setattr(Session, name, watch(name, getattr(Session, name)))
    return found


def prompt(first: int, count: int) -> list[int]:
    return [first, *np.random.default_rng(first).integers(0, 250, count - 1).tolist()]


LENGTHS = (1, 63, 64, 65, 128, 129, 200, 450)


def test_calls_follow_from_the_prompt_alone(
    model: q35c.Model, calls: dict[int, list[Call]]
) -> None:
    for first, count in enumerate(LENGTHS):
        table = Table(model)
        table.ask(request(prompt(first, count), 3))
        table.finish()
    alone = {first: list(made) for first, made in calls.items()}
    assert alone[6] == [
        ("extend", 0, 64),
        ("extend", 64, 64),
        ("extend", 128, 64),
        ("prefill", 192, 8),
    ]
    assert alone[4] == [("extend", 0, 64), ("prefill", 64, 64)]
    for max_stall in (1e-9, 1e9):
        calls.clear()
        table = Table(model, max_stall=max_stall)
        table.ask(*(request(prompt(100 + i, 5), 60, client="busy") for i in range(4)))
        table.turn(3)
        table.ask(*(request(prompt(i, n), 3, client=str(i)) for i, n in enumerate(LENGTHS)))
        table.finish()
        assert {first: calls[first] for first in alone} == alone


def test_a_hit_leaves_the_rest_of_the_calls(
    model: q35c.Model, calls: dict[int, list[Call]]
) -> None:
    start, more = 201, prompt(7, 90)
    first = [7, *prompt(8, 200), start, *more]
    second = [*first, 9, 9, start, *more]
    table = Table(model)
    table.ask(request(second, 3))
    table.finish()
    cold = list(calls[7])
    for neighbours in (0, 3):
        table = Table(model)
        table.turns._cache = PrefixCache(model.session, model.manifest, 1 << 30, start)
        table.ask(*(request(prompt(100 + i, 5), 60) for i in range(neighbours)))
        table.turn(2)
        table.ask(request(first, 3))
        table.turn(12)
        calls.clear()
        (answer,) = table.ask(request(second, 3))
        table.finish()
        cached = answer.last.usage.cached_tokens
        assert cached == 192 and calls[7] == [call for call in cold if call[1] >= cached]


def test_rows_get_on_beside_a_long_prompt(model: q35c.Model) -> None:
    table = Table(model)
    (talker,) = table.ask(request([1], 100))
    table.turn(2)
    (reader,) = table.ask(request(prompt(2, 640), 1))
    before = len(talker.tokens)
    table.turn(9)
    assert len(talker.tokens) == before + 9 and not reader.is_over
    table.turn()
    assert reader.is_over


def test_slices_fill_the_time_that_a_stall_may_last() -> None:
    pace = Pace(0.2)
    assert pace.slices(None) == 4 and pace.slices(0.01) == 1
    pace.note_slice(3, 0.001)  # the rest of a prompt
    assert pace.slices(0.01) == 1
    pace.note_slice(64, 0.05)
    assert [pace.slices(seconds) for seconds in (0.0, 0.05, 0.11, 0.15, 0.3)] == [4, 3, 1, 1, 1]
    assert pace.slices(None) == 4


def test_stall_ratio_is_that_of_steps_with_as_many_rows() -> None:
    pace = Pace(0.2)
    for _ in range(50):
        pace.note_step(1, 0.01)
        pace.note_step(8, 0.08)
    assert pace.stall_ratio == pytest.approx(1, abs=0.01)
    for _ in range(50):
        pace.note_step(1, 0.04)
    assert pace.stall_ratio == pytest.approx(4, rel=0.1)


def test_shorter_prompts_go_first_but_not_for_ever(
    model: q35c.Model, calls: dict[int, list[Call]]
) -> None:
    table = Table(model)
    table.ask(request(prompt(1, 256), 1))
    table.turn()
    for i in range(30):
        table.ask(request(prompt(10 + i, 128), 1))
    for _ in range(100):
        table.turn()
        if table.answers[0].is_over:
            break
    passed = [n for n, a in table.answers.items() if a.is_over and n != 0]
    assert (
        1 <= len(passed) <= 3
    )  # at most as many tokens as it had left itself, and one more prompt
    table.finish()


def test_a_client_with_little_need_not_wait_for_one_with_much(model: q35c.Model) -> None:
    table = Table(model)
    greedy = table.ask(*(request(prompt(i, 400), 200, client="greedy") for i in range(20)))
    table.turn(60)
    assert len(table.turns.seats) == 4
    (modest,) = table.ask(request(prompt(90, 100), 5, client="modest"))
    table.turn(2 + 2 * 5 + 1)
    assert modest.is_over
    assert sum(answer.is_over for answer in greedy) <= 1
    assert max(table.turns.rows) == 4


def test_rows_beyond_a_step_take_turns(model: q35c.Model) -> None:
    table = Table(model, batch=2)
    answers = table.ask(*(request([i], 50, client=str(i)) for i in range(3)))
    table.turn(33)
    counts = [len(answer.tokens) for answer in answers]
    assert sum(counts) > 50 and max(counts) - min(counts) <= 3
    table.finish()
    assert max(table.turns.rows) == 2


def test_seats_go_to_clients_by_what_they_were_given(model: q35c.Model) -> None:
    table = Table(model, batch=1)
    table.ask(*(request([i], 10, client="a") for i in range(4)))
    table.turn(2)
    table.ask(*(request([i], 10, client="b") for i in range(3)))
    table.finish()
    assert table.seated == [0, 4, 1, 5, 2, 6, 3]


def test_priority_goes_first(model: q35c.Model) -> None:
    table = Table(model, batch=1)
    table.ask(*(request([i], 3, priority=p) for i, p in enumerate((0, 1, -1, 0, -1))))
    table.finish()
    assert table.seated == [2, 4, 0, 3, 1]


def test_nothing_is_kept_of_clients_that_left(model: q35c.Model) -> None:
    table = Table(model)
    table.ask(*(request([i], 2, client=f"client {i}") for i in range(100)))
    table.finish()
    assert len(table.turns.queue_shares) == 0


class Memory:
    """Stand in for `Model.session` that refuses beyond so many open tokens."""

    def __init__(self, model: q35c.Model, tokens: int) -> None:
        self._model, self._tokens, self._open = model, tokens, list[Session]()

    def session(self, context: int) -> Session:
        self._open = [session for session in self._open if not session.is_closed]
        if sum(session.context for session in self._open) + context > self._tokens:
            raise MemoryRefused("no memory")
        self._open.append(self._model.session(context))
        return self._open[-1]


def test_requests_wait_for_memory(model: q35c.Model) -> None:
    table = Table(model)
    table.turns._cache = PrefixCache(Memory(model, 250).session, model.manifest, 0)
    answers = table.ask(*(request(prompt(i, 100), 5) for i in range(5)))
    table.turn()
    assert len(table.turns.seats) == 2 and table.seated == [0, 1]
    table.finish()
    assert [len(answer.ids) for answer in answers] == [5] * 5


def test_what_never_fits_is_refused(model: q35c.Model) -> None:
    table = Table(model)
    table.turns._cache = PrefixCache(Memory(model, 250).session, model.manifest, 0)
    large, small = table.ask(request(prompt(1, 300), 5), request(prompt(2, 100), 5))
    table.finish()
    assert isinstance(large.last, Failed) and isinstance(large.last.error, MemoryRefused)
    assert len(small.ids) == 5


def test_rows_ask_for_memory_as_they_grow(
    model: q35c.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_file, "RESERVED_TOKENS", 4)
    table = Table(model)
    (answer,) = table.ask(request([1], 30))
    table.turn()
    (seat,) = table.turns.seats.values()
    assert seat.session.context == 5
    table.finish()
    assert answer.last.reason == "length" and len(answer.ids) == 30
    (whole,) = table.ask(request([1], 10**6))
    table.finish()
    assert whole.last.reason == "context" and len(whole.ids) == CONTEXT
    want = model.generate([1], -1, stop_ids=[], temperature=0.0)
    assert tuple(whole.ids) == want.ids and want.finish_reason == "context"


def test_a_row_that_may_not_grow_ends(model: q35c.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_file, "RESERVED_TOKENS", 4)

    def refuse(self: Session, context: int) -> None:
        raise MemoryRefused("no memory")

    monkeypatch.setattr(Session, "resize", refuse)
    table = Table(model)
    (answer,) = table.ask(request([1], 30))
    table.finish()
    assert answer.last.reason == "context" and 3 <= len(answer.ids) <= 5


def test_a_turn_ends_early_for_commands(model: q35c.Model, tmp_path: Path) -> None:
    table = Table(model)
    table.ask(request(prompt(1, 640), 1))
    table.turns.take_turn(lambda: True)
    assert table.turns.counts["prefill_slices"] == 1
    table.turn()
    assert table.turns.counts["prefill_slices"] == 5
