"""A kernel family in one row, at the foot of its file; `families.py` lists the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from q35c.codegen.calls import Cost, Division, Signature
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
    cost: Callable[[Parameters], Cost]
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


# --- what rows say of bytes and operations --------------------------------------------------------

F32_BYTES = 4
EXP_OPERATIONS = 12  # of a vectorised exponential, about


def peak_of(dtype: str) -> Literal["int8", "bf16", "f32"]:
    """Return the peak that bounds products with values stored in this format."""
    return dtype if dtype in ("bf16", "f32") else "int8"  # type: ignore[return-value]


def row_bytes(width: int, dtype: str) -> float:
    """Return the bytes of an activation row: f32, bf16, or int8 with a scale and a sum for each group."""
    if form := integer_format(dtype):
        return width + 8 * -(-width // form.group)
    return width * {"f32": F32_BYTES, "bf16": 2}[dtype]


def rounded_bytes(p: Parameters, width: int) -> float:
    """Return the bytes of the row of `width` values that a kernel rounds beside what it makes, 0 if it rounds none."""
    return row_bytes(width, f"q8g{p['group']}") if p.get("group") else 0


def elementwise(words: float, operations: float) -> Cost:
    """Return the cost of a formula over f32 words of each row."""
    return Cost(cached_bytes_per_token=words * F32_BYTES, operations_per_token=operations)


def rounding(p: Parameters, dtype: str) -> Cost:
    """Return the cost of rounding rows of K values, `pairs` of them a token."""
    values = p["K"] * p["pairs"]
    cached = p["pairs"] * (p["K"] * F32_BYTES + row_bytes(p["K"], dtype))
    return Cost(cached_bytes_per_token=cached, operations_per_token=5 * values)


def weight_bytes(N: int, K: int, dtype: str) -> int:
    """Return about how many bytes a matrix has; scales do not count."""
    form = integer_format(dtype)
    return N * K * (form.bits if form else {"f32": 32, "bf16": 16}[dtype]) // 8
