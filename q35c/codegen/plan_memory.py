"""Place the temporaries of one entry in the arena: those that never live together may share bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from q35c.layouts.blobs import align


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A buffer that is needed from step `first` to step `last`, both included."""

    name: str
    bytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Byte offsets of the buffers in an arena of exactly `bytes`."""

    offsets: dict[str, int]
    bytes: int


def plan_memory(lifetimes: Iterable[Lifetime]) -> MemoryPlan:
    """Give each buffer the lowest 64-byte aligned offset that no buffer alive with it overlaps.

    Largest first, as in greedy interval colouring; the result is exact, so the arena's peak is known
    before anything runs.
    """
    placed: list[tuple[int, int, Lifetime]] = []  # start, end, buffer; sorted by start
    offsets: dict[str, int] = {}
    for buffer in sorted(lifetimes, key=lambda b: (-b.bytes, b.first, b.name)):
        size = align(buffer.bytes)
        start = 0
        for other_start, other_end, other in placed:
            if other.last < buffer.first or buffer.last < other.first:
                continue
            if other_start >= start + size:
                break
            start = max(start, other_end)
        offsets[buffer.name] = start
        placed.append((start, start + size, buffer))
        placed.sort(key=lambda item: item[0])
    return MemoryPlan(offsets, max((end for _, end, _ in placed), default=0))
