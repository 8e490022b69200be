"""A kernel family in one row, at the foot of its file; `families.py` lists the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from q35c.codegen.calls import Division, Signature
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
    """What makes a family's kernels, and what code generation must know of them.

    `arguments` are the PrimFunc's parameters in their order, in lower case, without `tid` and `nt`, which end all of them.
    `writes` are the pointers that kernels of the family store to; one that a kernel does not take is passed over.
    """

    make: Callable[..., Any]  # parameters (and the instruction set, as `isa`) -> PrimFunc
    arguments: str | Callable[[Parameters], str]
    writes: str
    takes_isa: bool = True
    scratch: Callable[[Parameters, Room], int] | None = None  # bytes for all threads and rows
    division: Callable[[Parameters], Division | None] | None = None  # None: never worth it

    @property
    def name(self) -> str:
        return self.make.__name__

    def signature(self, parameters: Parameters) -> Signature:
        """Return what the kernel with these parameters takes and stores to."""
        names = self.arguments if isinstance(self.arguments, str) else self.arguments(parameters)
        taken = tuple(names.split())
        return Signature(taken, frozenset(self.writes.split()).intersection(taken))


def weight_bytes(N: int, K: int, dtype: str) -> int:
    """Return about how many bytes a matrix has; scales do not count."""
    form = integer_format(dtype)
    return N * K * (form.bits if form else {"f32": 32, "bf16": 16}[dtype]) // 8
