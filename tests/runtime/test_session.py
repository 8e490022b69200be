"""Sessions: however a sequence is cut, kept, restored or batched, the logits are the same bits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.errors import ExecutionError, OptionError, PromptError
from q35c.runtime.session import Session
from tests.fake_artifact import BATCH, CONTEXT, MAX_TOKENS, VOCAB, write_fake
from tests.runtime.sequences import FAILING, one_shot, random_ids


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("session") / "m.q35c"
    write_fake(place, failing_token=FAILING)
    return place


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[q35c.Model]:
    with q35c.load(path, threads=1) as loaded:
        yield loaded


def test_every_split_gives_the_same_bits(model: q35c.Model) -> None:
    ids = random_ids(2 * MAX_TOKENS + 5)
    want = one_shot(model, ids)
    assert want.shape == (VOCAB,) and want.dtype == np.float32
    for split in range(1, len(ids)):
        with model.session() as session:
            session.prefill(ids[:split])
            assert np.array_equal(session.prefill(ids[split:]), want), split
            assert session.length == session.position == len(ids)


def test_token_by_token(model: q35c.Model) -> None:
    ids = random_ids(40, 1)
    scored = model.score(ids)
    assert scored.shape == (40, VOCAB)
    with model.session() as session:
        for token, want in zip(ids, scored, strict=True):
            assert np.array_equal(session.decode(token), want)


def test_ids_in_every_form(model: q35c.Model) -> None:
    ids = random_ids(9)
    want = one_shot(model, ids)
    forms = (tuple(ids), np.array(ids), np.array(ids, np.uint16), deque(ids), [*np.array(ids)])
    for form in forms:
        with model.session() as session:
            assert np.array_equal(session.prefill(form), want)
    for form in (iter(ids), set(ids), dict.fromkeys(ids), bytes(9), np.array(ids, float)):
        with model.session() as session, pytest.raises(PromptError):
            session.prefill(form)
        assert session.length == 0


def test_logits_are_the_callers_own(model: q35c.Model) -> None:
    with model.session() as session:
        first = session.prefill([1, 2])
        copy = first.copy()
        session.decode(3)
        assert np.array_equal(first, copy)


def test_rows_of_a_batch_are_independent(model: q35c.Model) -> None:
    prompts = [random_ids(length, length) for length in (3, 40, 1, 17)]
    alone = []
    for prompt in prompts:
        with model.session() as session:
            session.prefill(prompt)
            alone.append([session.decode(token) for token in (5, 6, 7)])
    sessions = [model.session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.prefill(prompt)
    for step, token in enumerate((5, 6, 7)):
        # Fewer rows and another order: a row's place in the batch must not matter either.
        order = [0, 1, 2, 3] if step != 1 else [2, 0, 3, 1]
        rows = Session.decode_together([sessions[i] for i in order], [token] * 4)
        for row, index in zip(rows, order, strict=True):
            assert np.array_equal(row, alone[index][step])


def test_more_rows_than_the_compiled_batch_take_several_steps(model: q35c.Model) -> None:
    prompts = [random_ids(length, length) for length in range(1, 2 * BATCH + 2)]
    sessions = [model.session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.prefill(prompt)
    rows = Session.decode_together(sessions, [5] * len(prompts))
    for row, prompt in zip(rows, prompts, strict=True):
        assert np.array_equal(row, one_shot(model, [*prompt, 5]))
    # A failure in the second of three steps: what was computed before it stands.
    with pytest.raises(ExecutionError):
        Session.decode_together(sessions, [5] * BATCH + [FAILING] + [5] * BATCH)
    assert [session.is_usable for session in sessions] == [True] * BATCH + [False] * (BATCH + 1)
    assert np.array_equal(sessions[0].decode(6), one_shot(model, [*prompts[0], 5, 5, 6]))


def test_progress_counts_chunks(model: q35c.Model) -> None:
    seen: list[tuple[int, int]] = []
    with model.session() as session:
        session.prefill(random_ids(40), lambda *done: seen.append(done))
    assert seen == [(16, 40), (32, 40), (40, 40)]
    seen.clear()
    model.score(random_ids(20), lambda *done: seen.append(done))
    assert seen == [(8, 20), (16, 20), (20, 20)]


def test_a_cancelled_prefill_keeps_whole_chunks(model: q35c.Model) -> None:
    ids = random_ids(40)

    def cancel(done: int, total: int) -> None:
        if done == 32:
            raise KeyboardInterrupt

    with model.session() as session:
        with pytest.raises(KeyboardInterrupt):
            session.prefill(ids, cancel)
        assert session.length == 32
        assert np.array_equal(session.prefill(ids[32:]), one_shot(model, ids))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100])
def test_snapshot_brings_back_the_same_bits(model: q35c.Model, length: int) -> None:
    ids, tail = random_ids(length), random_ids(45, 5)
    with model.session() as session, model.session() as other:
        session.prefill(ids)
        snapshot = session.snapshot()
        want = session.prefill(tail)
        session.restore(snapshot)
        assert session.length == length
        assert np.array_equal(session.prefill(tail), want)
        other.prefill(random_ids(3, 9))  # what was there before must not matter
        other.restore(snapshot)
        assert np.array_equal(other.prefill(tail), want)


def test_snapshot_copies_used_cells_only(model: q35c.Model) -> None:
    with model.session() as session:
        empty = session.snapshot()
        session.prefill(random_ids(33))
        snapshot = session.snapshot()
    fixed = (96 + 32 * 32) * 4
    assert empty.bytes == fixed
    assert snapshot.bytes == fixed + 4 * 32 * (2 * 32 + 33) + 8 * 33  # and the ids


def test_an_empty_snapshot_restores_the_beginning(model: q35c.Model) -> None:
    with model.session() as session:
        empty = session.snapshot()
        want = session.prefill([1, 2, 3])
        session.restore(empty)
        assert session.length == 0
        assert np.array_equal(session.prefill([1, 2, 3]), want)


def test_reset_empties(model: q35c.Model) -> None:
    with model.session() as session:
        session.prefill(random_ids(50))
        session.reset()
        assert (session.length, session.position) == (0, 0)
        assert np.array_equal(session.prefill([1, 2]), one_shot(model, [1, 2]))


def test_the_context_is_a_hard_limit(model: q35c.Model) -> None:
    ids = random_ids(CONTEXT)
    with model.session() as session:
        session.prefill(ids)
        snapshot = session.snapshot()
        for call in (
            lambda: session.decode(1),
            lambda: session.prefill([1]),
            lambda: session.score([1]),
        ):
            with pytest.raises(PromptError, match="context"):
                call()
        session.restore(snapshot)
    with model.session(context=10) as session:
        session.prefill(ids[:6])
        with pytest.raises(PromptError, match="at most 4 more"):
            session.prefill(ids[:5])
        assert np.array_equal(session.prefill(ids[6:10]), one_shot(model, ids[:10]))
        with pytest.raises(OptionError, match="longer"):
            session.restore(snapshot)


@pytest.mark.parametrize("bad", [[], [VOCAB], [-1], [1, 2**40], [1.0], ["a"], [True], [None]])
def test_bad_ids_change_nothing(model: q35c.Model, bad: list) -> None:
    with model.session() as session:
        session.prefill([4, 5])
        with pytest.raises(PromptError):
            session.prefill(bad)
        with pytest.raises(PromptError):
            session.score(bad)
        assert np.array_equal(session.prefill([6]), one_shot(model, [4, 5, 6]))


@pytest.mark.parametrize("context", [0, -1, CONTEXT + 1, 1.0, True, "8"])
def test_context_option(model: q35c.Model, context: object) -> None:
    with pytest.raises(OptionError):
        model.session(context=context)  # type: ignore[arg-type]


def test_batch_misuse_changes_nothing(model: q35c.Model) -> None:
    sessions = [model.session() for _ in range(BATCH + 1)]
    full = model.session(context=1)
    full.prefill([1])
    wrong = [
        ([*sessions, full], [1] * (BATCH + 2)),
        (sessions, [1] * BATCH),
        (sessions[:2], [1]),
        ([sessions[0], sessions[0]], [1, 1]),
        ([sessions[0], full], [1, 1]),
    ]
    for rows, tokens in wrong:
        with pytest.raises((OptionError, PromptError)):
            Session.decode_together(rows, tokens)
    assert np.array_equal(sessions[0].decode(7), one_shot(model, [7]))


def test_a_failed_step_breaks_the_session_until_it_is_restored(model: q35c.Model) -> None:
    with model.session() as session:
        session.prefill([1, 2])
        snapshot = session.snapshot()
        with pytest.raises(ExecutionError):
            session.decode(FAILING)
        with pytest.raises(OptionError, match="undefined"):
            session.decode(3)
        with pytest.raises(OptionError, match="undefined"):
            session.snapshot()
        session.restore(snapshot)
        assert np.array_equal(session.decode(3), one_shot(model, [1, 2, 3]))
        with pytest.raises(ExecutionError):
            session.prefill([FAILING])
        with pytest.raises(OptionError, match="undefined"):
            session.prefill([1])
        session.reset()
        assert np.array_equal(session.prefill([8]), one_shot(model, [8]))


def test_closed_session(model: q35c.Model) -> None:
    session = model.session()
    session.close()
    session.close()
    for call in (lambda: session.decode(1), session.snapshot, session.reset):
        with pytest.raises(OptionError, match="closed"):
            call()


def test_two_threads_in_one_session_are_told(model: q35c.Model) -> None:
    inside, leave = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> None:
        inside.set()
        leave.wait(120)

    with model.session() as session:
        thread = threading.Thread(target=session.prefill, args=([1, 2, 3], wait))
        thread.start()
        inside.wait(120)
        with pytest.raises(OptionError, match="in use"):
            session.decode(1)
        leave.set()
        thread.join()
        assert np.array_equal(session.decode(4), one_shot(model, [1, 2, 3, 4]))


def test_sessions_of_several_models_do_not_mix(
    model: q35c.Model, path: Path, tmp_path: Path
) -> None:
    write_fake(tmp_path / "other", precision="other")
    twin, stranger = q35c.load(path, threads=1), q35c.load(tmp_path / "other", threads=1)
    with model.session() as session, twin.session() as same, stranger.session() as other:
        session.prefill([1, 2])
        same.restore(session.snapshot())  # the same file: the same model
        assert np.array_equal(same.decode(3), session.decode(3))
        with pytest.raises(OptionError, match="another model"):
            other.restore(session.snapshot())
        with pytest.raises(OptionError, match="several models"):
            Session.decode_together([session, same], [1, 1])


def test_threads_change_nothing(path: Path) -> None:
    ids = random_ids(50)
    with q35c.load(path, threads=1) as one, q35c.load(path, threads=2) as two:
        assert np.array_equal(one.score(ids), two.score(ids))


@pytest.mark.parametrize(
    ("threads", "rounds"),
    [(1, 12), (2, 12), *(pytest.param(n, 100, marks=pytest.mark.slow) for n in (1, 2))],
)
def test_eight_threads_with_many_sessions(path: Path, threads: int, rounds: int) -> None:
    """R15: each of 8 threads' sessions gives what it gives alone."""
    with q35c.load(path, threads=threads) as model:
        prompts = [[random_ids(5 + r, 100 * t + r) for r in range(rounds)] for t in range(8)]
        wants = [[one_shot(model, [*prompt, 1, 2]) for prompt in mine] for mine in prompts]
        wrong: list[object] = []

        def work(mine: list[list[int]], want: list[np.ndarray]) -> None:
            try:
                for prompt, expected in zip(mine, want, strict=True):
                    with model.session() as session:
                        session.prefill(prompt)
                        session.decode(1)
                        if not np.array_equal(session.decode(2), expected):
                            wrong.append(prompt)
            except BaseException as error:
                wrong.append(error)

        workers = [
            threading.Thread(target=work, args=pair) for pair in zip(prompts, wants, strict=True)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []
