"""Targets: the names users give, and the instruction set and limits that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from q35c.codegen.isa.x86 import ISAS, Isa, detect
from q35c.errors import OptionError


@dataclass(frozen=True, slots=True)
class Target:
    """What code generation needs to know about the machine that will run the artifact."""

    name: str  # canonical, e.g. cpu:x86-64-v3
    isa: Isa
    max_threads: int = 16  # bounds the scratch in the arena
    prefill_tokens: int = 256  # rows per prefill call: enough for full tiles, small in memory
    logits_bytes: int = 32 << 20  # bounds the rows of one score call


def find_target(name: str) -> Target:
    """Return the target called `cpu` (this machine) or `cpu:LEVEL`, or raise OptionError."""
    family, _, level = name.partition(":")
    if family != "cpu" or (level and level not in ISAS):
        known = ", ".join(["cpu", *(f"cpu:{isa}" for isa in ISAS)])
        raise OptionError("unknown target", where="--target", expected=known, got=name)
    isa = ISAS[level] if level else detect()
    return Target(f"cpu:{isa.name}", isa)
