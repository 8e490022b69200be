"""A kernel family in one row, at the foot of its file; `families.py` lists the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from q35c.codegen.calls import Division
from q35c.codegen.cpu.isa.base import Isa
from q35c.formats.registry import integer_format

PART_BYTES = 256 << 10  # least work of a part: what takes about 10 us to read

Parameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Room:
    """What the size of scratch depends on beside a kernel's parameters."""

    isa: Isa
    threads: int  # the most that run a program
    tokens: int  # the most of a call


@dataclass(frozen=True, slots=True)
class Family:
    """What makes a family's kernels, and what code generation must know of them."""

    make: Callable[..., Any]  # parameters (and the instruction set, as `isa`) -> PrimFunc
    takes_isa: bool = True
    scratch: Callable[[Parameters, Room], int] | None = None  # bytes for all threads and rows
    division: Callable[[Parameters], Division | None] | None = None  # None: never worth it

    @property
    def name(self) -> str:
        return self.make.__name__


def weight_bytes(N: int, K: int, dtype: str) -> int:
    """Return about how many bytes a matrix has; scales do not count."""
    form = integer_format(dtype)
    return N * K * (form.bits if form else {"f32": 32, "bf16": 16}[dtype]) // 8
