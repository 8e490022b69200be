"""The prefix cache: what it finds, what it gives up, and that it changes no bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import q35c
from q35c.errors import ExecutionError, MemoryRefused
from q35c.runtime.lease import Lease, last_cut, plan_points
from q35c.runtime.memory import state_bytes
from q35c.runtime.prefix import PrefixCache
from q35c.runtime.recent import RecentPrompts, agreement
from tests.fake_artifact import write_fake
from tests.prompts import conversations

CONTEXT, START, FAILING = 2048, 200, 99


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    place = tmp_path_factory.mktemp("prefix") / "m.q35c"
    write_fake(place, failing_token=FAILING, context=CONTEXT)
    with q35c.load(place, threads=1) as loaded:
        yield loaded


def cache_of(model: q35c.Model, max_bytes: int = 1 << 30) -> PrefixCache:
    cache = PrefixCache(model.session, model.manifest, max_bytes, START)
    cache.shares_lent = True
    return cache


def text(count: int, seed: int) -> list[int]:
    """Return tokens without the one that begins a message."""
    return np.random.default_rng(seed).integers(0, 90, count).tolist()


def fill(lease: Lease) -> np.ndarray:
    while (logits := lease.advance()) is None:
        pass
    return logits


def ask(
    cache: PrefixCache, ids: list[int], salt: str = "", answer: int = 3
) -> tuple[int, np.ndarray]:
    """Fill a prompt, say something, and give the session back; return the cached tokens and the logits."""
    lease = cache.open(ids, len(ids) + answer + 1, salt)
    logits = fill(lease)
    for token in range(answer):
        lease.session.decode(token)
    lease.end()
    return lease.cached_tokens, logits


def cold(model: q35c.Model, ids: list[int]) -> np.ndarray:
    with model.session() as session:
        if border := last_cut(len(ids)):
            session.extend(ids[:border])
        return session.prefill(ids[border:])


def first_turn(system: int = 150, question: int = 80) -> list[int]:
    return [START, *text(system, 1), START, 5, *text(question, 2), START, 6]


def next_turn(ids: list[int], seed: int = 3, count: int = 70) -> list[int]:
    return [*ids, *text(20, seed), START, 5, *text(count, seed + 1), START, 6]


def test_points_are_on_the_grid() -> None:
    ids = np.array(next_turn(first_turn()), np.int64)
    starts = np.flatnonzero(ids == START)
    assert plan_points(ids, START) == (128, 320) == (starts[1] // 64 * 64, starts[-1] // 64 * 64)
    assert plan_points(ids, START, branch=270) == (128, 256, 320)
    assert plan_points(ids, None) == (last_cut(len(ids)),) == (320,)
    assert plan_points(ids[:65], START) == (64,) and plan_points(ids[:64], START) == ()
    assert plan_points(ids[:129], None) == (128,) and plan_points(ids[:128], None) == (64,)


def test_the_next_turn_goes_on_in_place(model: q35c.Model) -> None:
    cache, ids = cache_of(model), first_turn()
    assert ask(cache, ids)[0] == 0
    (session,) = [branch.session for branch in cache._parked]
    second = next_turn(ids)
    found, logits = ask(cache, second)
    assert found == 192 and np.array_equal(logits, cold(model, second))
    assert [branch.session for branch in cache._parked] == [session]
    third = next_turn(second)
    found, logits = ask(cache, third)
    assert found == 320 and np.array_equal(logits, cold(model, third))
    cache.close()
    assert session.is_closed


def test_a_turn_may_need_less_room_than_the_one_before(model: q35c.Model) -> None:
    cache, ids = cache_of(model), first_turn()
    ask(cache, ids, answer=60)
    cached, logits = ask(cache, ids, answer=3)  # the session holds more than this context
    assert cached == 192
    np.testing.assert_array_equal(logits, cold(model, ids))


def test_another_conversation_shares_the_system_message(model: q35c.Model) -> None:
    cache, ids = cache_of(model), first_turn()
    ask(cache, next_turn(ids))
    other = [*ids[:151], START, 5, *text(60, 7), START, 6]
    found, logits = ask(cache, other)
    assert found == 128 and np.array_equal(logits, cold(model, other))
    assert len(cache._parked) == 2
    assert ask(cache, next_turn(next_turn(ids)))[0] == 320  # the first one lost nothing


def test_a_session_in_use_can_be_shared(model: q35c.Model) -> None:
    cache, ids = cache_of(model), first_turn()
    lease = cache.open(ids, 1000)
    fill(lease)
    second = next_turn(ids)
    found, logits = ask(cache, second)
    assert found == 192 and np.array_equal(logits, cold(model, second))
    again = cache.open(ids, 1000)
    assert again.cached_tokens == 192 and np.array_equal(fill(again), cold(model, ids))
    before = lease.session.decode(5)
    assert np.array_equal(before, again.session.decode(5))
    lease.end()
    again.end()
    assert len(cache._parked) == 1  # the others have nothing beyond it
    cache.close()


def test_salts_are_worlds_of_their_own(model: q35c.Model) -> None:
    cache, ids = cache_of(model), first_turn()
    assert [ask(cache, ids, salt)[0] for salt in ("a", "b", "a", "b")] == [0, 0, 192, 192]
    assert cache.misses == {"new": 1, "salt": 1}


def test_reasons(model: q35c.Model) -> None:
    cache, ids = cache_of(model), first_turn(system=400, question=300)
    lease = cache.open(ids, 1000)
    assert lease.miss.reason == "new"
    fill(lease)
    lease.end()
    # It goes on where the first ended, and then it does so again.
    lease = cache.open(next_turn(ids), 1500)
    assert lease.miss is None
    fill(lease)
    lease.end()
    # Halfway into the question, where nothing is kept: the end of the system message is found.
    other = [*ids[:600], *text(100, 9), START, 6]
    lease = cache.open(other, 1500)
    assert lease.cached_tokens == 384
    assert (lease.miss.reason, lease.miss.agreed_tokens) == ("unmarked", 600)
    fill(lease)
    lease.end()
    lease = cache.open([*ids[:600], *text(90, 10), START, 6], 1500)
    assert lease.cached_tokens == 576 and lease.miss.reason == "diverged"
    lease.end(keeps=False)
    cache.close()
    assert "token 600" in lease.miss.describe(700, 576)


def test_what_was_evicted_is_said_so(model: q35c.Model) -> None:
    cache, ids = cache_of(model), first_turn()
    ask(cache, ids)
    while cache.shrink():
        pass
    lease = cache.open(next_turn(ids), 1000)
    assert lease.cached_tokens == 0 and lease.miss.reason == "evicted"
    assert cache.parked_bytes == cache.cached_bytes == 0


def test_the_oldest_moves_to_the_tree_and_is_shared_there(model: q35c.Model) -> None:
    system = first_turn(system=640)[:641]
    prompts = [[*system, START, 5, *text(100, i), START, 6] for i in range(8)]
    one = state_bytes(model.manifest, 768)
    cache = cache_of(model, 4 * one)
    for ids in prompts:
        ask(cache, ids)
        assert cache.parked_bytes + cache.cached_bytes <= cache.max_bytes
    # There is room for four that share nothing.
    assert not cache.evictions and len(cache._tree) > 4
    held = [ask(cache, [*ids, *text(3, 77)])[0] for ids in prompts]
    assert held == [704] * 8
    for ids in prompts:
        _, logits = ask(cache, [*ids, 7])
        assert np.array_equal(logits, cold(model, [*ids, 7]))
    cache.close()
    assert cache.cached_bytes == 0


def test_the_tree_counts_its_bytes(model: q35c.Model) -> None:
    cache = cache_of(model, 1)  # everything that is given back moves, and is given up
    for seed in range(3):
        ask(cache, first_turn(system=100 + 50 * seed))
        assert cache.parked_bytes + cache.cached_bytes == 0
    assert cache._tree._roots == {}


def test_what_failed_or_has_nothing_is_not_kept(model: q35c.Model) -> None:
    cache, ids = cache_of(model), first_turn()
    lease = cache.open(ids, 1000)
    fill(lease)
    with pytest.raises(ExecutionError):
        lease.session.decode(FAILING)
    lease.end()
    assert lease.session.is_closed
    lease = cache.open(ids, 1000)
    fill(lease)
    lease.end(keeps=False)
    assert lease.session.is_closed
    ask(cache, [1, 2, 3])
    assert cache._parked == [] == cache._lent


def test_an_interrupted_prompt_keeps_what_it_has(model: q35c.Model) -> None:
    cache, ids = cache_of(model), first_turn()
    lease = cache.open(ids, 1000)
    for _ in range(3):
        assert lease.advance() is None
    lease.end()
    found, logits = ask(cache, ids)
    assert found == 192 and np.array_equal(logits, cold(model, ids))


def test_off_is_off(model: q35c.Model) -> None:
    cache, ids = cache_of(model, 0), first_turn()
    assert [ask(cache, ids)[0] for _ in range(2)] == [0, 0]
    assert not cache._parked and not cache._lent and not cache.shrink()


def test_what_is_kept_gives_way_to_a_new_prompt(
    model: q35c.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, ids = cache_of(model), first_turn()
    ask(cache, ids)
    ask(cache, [START, *text(300, 5), START, 6])

    def refuse(*arguments: object) -> None:
        raise MemoryRefused("no")

    with monkeypatch.context() as patch:
        patch.setattr("q35c.runtime.session.Session.resize", refuse)
        found, logits = ask(cache, next_turn(ids))  # neither may grow, so both go
        assert found == 0 and np.array_equal(logits, cold(model, next_turn(ids)))
        assert cache.evictions == 2
        assert cache._parked == []  # and one that cannot even become smaller is closed
    with monkeypatch.context() as patch:
        ask(cache, ids)
        patch.setattr(cache, "_open_session", refuse)
        with pytest.raises(MemoryRefused):
            cache.open([1, *ids], 1000)
        assert not cache._parked and not cache._lent


def test_a_shorter_prompt_and_context(model: q35c.Model) -> None:
    cache, ids = cache_of(model), first_turn()
    ask(cache, ids, answer=50)
    found, logits = ask(cache, ids[:-5], answer=1)
    assert found == 192 and np.array_equal(logits, cold(model, ids[:-5]))


@pytest.mark.parametrize("max_states", [0.5, 2.5, 6, 1000])
def test_random_conversations_are_bit_equal_to_no_cache(
    model: q35c.Model, max_states: float
) -> None:
    cache = cache_of(model, int(max_states * state_bytes(model.manifest, 1000)))
    rng, found, total = np.random.default_rng(5), 0, 0
    lent: list[Lease] = []
    prompts = conversations(9, 150, vocab=250, start=START, most=1500, forbidden=FAILING)
    for ids in prompts:
        lease = cache.open(ids, len(ids) + 8)
        found, total = found + lease.cached_tokens, total + len(ids)
        if rng.random() < 0.1:  # cancelled on its way
            for _ in range(min(2, (len(ids) - lease.cached_tokens) // 64)):
                lease.advance()
            lease.end()
            continue
        assert np.array_equal(fill(lease), cold(model, ids)), f"{lease.cached_tokens} of {len(ids)}"
        lent.append(lease)
        if len(lent) > 2:
            ended = lent.pop(int(rng.integers(3)))
            for token in range(int(rng.integers(5))):
                ended.session.decode(token)
            ended.end()
        assert cache.parked_bytes + cache.cached_bytes <= cache.max_bytes
    for lease in lent:
        lease.end()
    assert found > 0.5 * total if max_states > 6 else found > 0
    cache.close()
    assert cache._tree.bytes == 0


def test_agreement() -> None:
    first = np.arange(200, dtype=np.int64)
    for count in (0, 1, 63, 64, 65, 199):
        other = first.copy()
        other[count] = -1
        assert agreement(first, other) == count
        assert agreement(first[:count], first) == count


def test_recent_prompts_are_bounded() -> None:
    recent = RecentPrompts()
    for seed in range(400):
        recent.add(np.full(100_000, seed, np.int64), "", (64,))
    assert len(recent._prompts) < 45
    new = np.full(100_000, 5, np.int64)
    assert recent.explain(new, "", 0).reason == "new"
    new[:] = 399
    assert recent.explain(new, "", 0).reason == "evicted"
