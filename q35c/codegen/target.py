"""Targets: the names users give, and the instruction set and limits that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from q35c import arguments
from q35c.codegen.isa.x86 import ISAS, Isa, detect


@dataclass(frozen=True, slots=True)
class Target:
    """What code generation needs to know about the machine that will run the artifact."""

    name: str  # canonical, e.g. cpu:x86-64-v3
    isa: Isa
    max_threads: int = 16  # bounds the scratch in the arena
    prefill_tokens: int = 256  # rows per prefill call: enough for full tiles, small in memory
    logits_bytes: int = 32 << 20  # bounds the rows of one score call
    decode_tasks: int = 32  # parts of one sequence's attention in decode: two for each thread
    split_cells: int = (
        256  # least part of the full context, beside whose bytes a part's sums are few
    )

    def decode_splits(self, kv_heads: int, context: int) -> int:
        """Return into how many parts the cells of one key head are split when a decode step attends to them."""
        return max(1, min(-(-self.decode_tasks // kv_heads), context // self.split_cells))


def find_target(name: str) -> Target:
    """Return the target called `cpu` (this machine) or `cpu:LEVEL`, or raise OptionError."""
    known = ["cpu", *(f"cpu:{isa}" for isa in ISAS)]
    level = arguments.choice("target", name, known, "target").removeprefix("cpu").removeprefix(":")
    isa = ISAS[level] if level else detect()
    return Target(f"cpu:{isa.name}", isa)
