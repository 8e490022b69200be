"""What a kernel call must do at the least, by the numbers that its artifact states (`codegen/calls.py` defines them).

    limit = max(memory bytes / memory bandwidth, (memory + cache bytes) / cache bandwidth, operations / peak)

Memory bytes are those that are too many to stay in a cache from one step to the next. Of a small model all of it fits a
cache: its kernels may then be faster than this limit. Cache bytes are taken to come from the L2 cache. The weight of a
step is the largest that it reads; norm vectors beside it are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from q35c.artifact.kernels import KernelCost

Peak = Literal["int8", "bf16", "f32"]


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes from memory, bytes from caches and operations of one kernel call."""

    memory_bytes: float
    cache_bytes: float
    operations: float
    peak: Peak


@dataclass(frozen=True, slots=True)
class Work:
    """The size of one call: rows T, each sequence's length before it, bytes of the step's weight."""

    tokens: int
    starts: tuple[int, ...]
    weight_bytes: int

    @property
    def sequences(self) -> int:
        return len(self.starts)

    def cells(self) -> int:
        """Return the cells that attention reads, over all sequences."""
        per_sequence = self.tokens // self.sequences
        return sum(start + per_sequence for start in self.starts)

    def scores(self) -> int:
        """Return the (token, cell) pairs of causal attention, over all sequences."""
        run = self.tokens // self.sequences
        return sum(run * start + run * (run + 1) // 2 for start in self.starts)


def call_cost(kernel: KernelCost, work: Work) -> Cost:
    """Return the cost of one call of a kernel."""
    read = 1 - (1 - kernel.weight_share) ** work.tokens
    memory = work.weight_bytes * read + work.sequences * kernel.bytes_per_sequence
    memory += work.tokens * kernel.bytes_per_token + work.cells() * kernel.bytes_per_cell
    operations = work.tokens * kernel.operations_per_token
    operations += work.scores() * kernel.operations_per_score
    return Cost(memory, work.tokens * kernel.cached_bytes_per_token, operations, kernel.peak)
