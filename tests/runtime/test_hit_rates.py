"""S8: how much of what clients ask the cache has, by traces of thousands of tokens and the sizes of the 0.8B model.

No model runs: a stand-in for sessions knows how long it is, and whose tokens it holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from q35c.runtime import prefix
from q35c.runtime.lease import MOST_CHECKPOINTS, Branch
from q35c.runtime.prefix import PrefixCache
from q35c.runtime.recent import MISS_REASONS
from tests.traces import START, agents, chats, questions

FIXED, EACH = int(19.3 * 2**20), 12 << 10  # bytes of a state, and of each of its tokens
GB = 10**9


class Sized:
    """Stand in for a session, and check that it is used as one may be."""

    is_usable = True

    def __init__(self, context: int) -> None:
        self.context, self.length, self.high_water = context, 0, 0
        self.ids = np.empty(0, np.int64)

    def resize(self, context: int) -> None:
        assert context >= self.length
        self.context = context

    def extend(self, tokens: Any) -> None:
        self._become(np.concatenate([self.ids, np.asarray(tokens, np.int64)]))

    prefill = extend

    def checkpoint(self) -> SimpleNamespace:
        return SimpleNamespace(length=self.length, ids=self.ids.tobytes(), bytes=FIXED)

    def rewind(self, checkpoint: Any) -> None:
        assert self.ids[: checkpoint.length].tobytes() == checkpoint.ids
        self._become(self.ids[: checkpoint.length])

    def export_kv(self, start: int, end: int) -> SimpleNamespace:
        assert end <= self.length
        return SimpleNamespace(start=start, end=end, bytes=(end - start) * EACH)

    def import_kv(self, cells: Iterable[Any], checkpoint: Any) -> None:
        reached = 0
        for item in cells:
            assert item.start <= reached
            reached = item.end
        assert reached >= checkpoint.length
        self._become(np.frombuffer(checkpoint.ids, np.int64))

    def close(self) -> None:
        self.is_usable = False

    def _become(self, ids: np.ndarray) -> None:
        assert self.is_usable and len(ids) <= self.context
        self.ids, self.length = ids, len(ids)
        self.high_water = max(self.high_water, self.length)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "state_bytes", lambda manifest, tokens: FIXED + tokens * EACH)


def replay(trace: Iterable[list[int]], max_bytes: float) -> tuple[float, PrefixCache]:
    """Return the share of a trace's tokens that the cache had."""
    cache: Any = PrefixCache(Sized, None, int(max_bytes), START)  # type: ignore[arg-type]
    found = total = 0
    for ids in trace:
        lease = cache.open(ids, len(ids) + 600)
        found, total = found + lease.cached_tokens, total + len(ids)
        while lease.session.length < len(ids):
            lease.advance()
        lease.session.extend([7] * 500)  # the answer, by steps: of no use to another prompt
        lease.end()
        assert cache.parked_bytes + cache.cached_bytes <= cache.max_bytes
    return found / total, cache


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(
    ("name", "max_bytes", "least"),
    [
        ("chats", 2 * GB, 0.8),
        ("chats", 8 * GB, 0.8),
        ("agents", 2 * GB, 0.8),  # the third query of both is more than 2 GB
        ("agents", 8 * GB, 0.9),
        ("forgetful agents", 2 * GB, 0.9),
        ("forgetful agents", 8 * GB, 0.9),
        ("questions", 2 * GB, 0.2),
        ("questions", 8 * GB, 0.2),
    ],
)
def test_hit_rates(name: str, max_bytes: float, least: float) -> None:
    traces = {
        "chats": lambda: chats(1),
        "agents": lambda: agents(1),
        "forgetful agents": lambda: agents(1, sends_back=False),
        "questions": lambda: questions(1),
    }
    share, cache = replay(traces[name](), max_bytes)
    assert share >= least, f"{share:.1%}, {cache.evictions} evictions, {dict(cache.misses)}"
    assert set(cache.misses) <= set(MISS_REASONS)


def test_of_many_checkpoints_the_closest_go() -> None:
    branch = Branch(Sized(1), "")  # type: ignore[arg-type]
    lengths = [640, 6400, *range(6464, 12_000, 384), 12_800]
    branch.forks.add(6464)
    for length in lengths:
        branch.add(SimpleNamespace(length=length))  # type: ignore[arg-type]
    kept = sorted(branch.checkpoints)
    assert len(kept) == MOST_CHECKPOINTS and {640, 6400, 6464, 12_800} <= set(kept)
    while branch.thin():
        pass
    assert sorted(branch.checkpoints) == [640, 6464, 12_800]


@pytest.mark.usefixtures("sizes")
def test_a_small_request_does_not_push_out_a_large_conversation() -> None:
    """A client asks for a title beside each turn; there is room for little more than its conversation."""

    def trace() -> Iterable[list[int]]:
        rng = np.random.default_rng(0)
        for ids in agents(1, count=1, queries=1):
            yield ids
            yield [START, *rng.integers(10, 99, 400).tolist(), START]

    share, cache = replay(trace(), FIXED * 4 + EACH * 45_000)
    assert share >= 0.85, f"{share:.1%}, {cache.evictions} evictions, {dict(cache.misses)}"
