"""plan_memory: buffers that live together never overlap, and the arena is no larger than it must be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from q35c.codegen.plan_memory import Lifetime, MemoryPlan, plan_memory
from q35c.layouts.blobs import ALIGNMENT


def random_lifetimes(seed: int) -> list[Lifetime]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(rng.integers(1, 25)):
        first, second = np.sort(rng.integers(0, 12, 2))
        size = int(rng.choice([0, 1, 63, 64, 65, int(rng.integers(1, 5000))]))
        made.append(Lifetime(f"b{number}", size, int(first), int(second)))
    return made


def live_bytes(lifetimes: list[Lifetime], step: int) -> int:
    """Return the aligned bytes of all buffers alive at a step: no plan can do with fewer."""
    alive = [b.bytes for b in lifetimes if b.first <= step <= b.last]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in alive)


def collisions(plan: MemoryPlan, lifetimes: list[Lifetime]) -> list[tuple[str, str]]:
    found = []
    for a, b in itertools.combinations(lifetimes, 2):
        is_together = a.first <= b.last and b.first <= a.last
        low, high = plan.offsets[a.name], plan.offsets[b.name]
        if is_together and low < high + b.bytes and high < low + a.bytes:
            found.append((a.name, b.name))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_random_plans(seed: int) -> None:
    lifetimes = random_lifetimes(seed)
    plan = plan_memory(lifetimes)
    assert set(plan.offsets) == {b.name for b in lifetimes}
    assert not collisions(plan, lifetimes), f"seed {seed}"
    assert all(offset >= 0 and offset % ALIGNMENT == 0 for offset in plan.offsets.values())
    assert all(plan.offsets[b.name] + b.bytes <= plan.bytes for b in lifetimes), f"seed {seed}"
    least = max(live_bytes(lifetimes, step) for step in range(12))
    most = sum(-(-b.bytes // ALIGNMENT) * ALIGNMENT for b in lifetimes)
    assert least <= plan.bytes <= most and plan.bytes % ALIGNMENT == 0, f"seed {seed}"


@pytest.mark.parametrize("seed", range(10))
def test_order_does_not_matter(seed: int) -> None:
    lifetimes = random_lifetimes(seed)
    shuffled = [lifetimes[i] for i in np.random.default_rng(seed).permutation(len(lifetimes))]
    assert plan_memory(shuffled) == plan_memory(lifetimes), f"seed {seed}"


def test_a_chain_needs_two_buffers() -> None:
    """Each step reads the buffer of the step before: two places take turns."""
    chain = [Lifetime(f"x{i}", 256, i, i + 1) for i in range(10)]
    plan = plan_memory(chain)
    assert plan.bytes == 512
    assert set(plan.offsets.values()) == {0, 256}


def test_last_use_still_needs_the_buffer() -> None:
    """A step reads and writes at once: its input may not be where its output goes."""
    plan = plan_memory([Lifetime("x", 64, 0, 3), Lifetime("y", 64, 3, 4), Lifetime("z", 64, 4, 5)])
    assert plan.offsets["x"] != plan.offsets["y"] != plan.offsets["z"]
    assert plan.bytes == 128


def test_small_buffers_fill_a_gap() -> None:
    """`low` frees its place while `high` stays: the gap below `high` is used again."""
    low, high = Lifetime("low", 200, 0, 1), Lifetime("high", 128, 0, 9)
    later = [Lifetime("a", 64, 2, 9), Lifetime("b", 128, 2, 9), Lifetime("c", 64, 2, 9)]
    plan = plan_memory([low, high, *later])
    assert plan.bytes == 256 + 128
    assert not collisions(plan, [low, high, *later])


def test_sizes_are_rounded_to_cache_lines() -> None:
    plan = plan_memory([Lifetime("x", 65, 0, 1), Lifetime("y", 1, 0, 1)])
    assert plan == MemoryPlan({"x": 0, "y": 128}, 192)


def test_nothing_needs_nothing() -> None:
    assert plan_memory([]) == MemoryPlan({}, 0)
