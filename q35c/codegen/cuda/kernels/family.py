"""A kernel family in one row, at the foot of its file; `families.py` lists the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from q35c.artifact.target import CudaExtent
from q35c.codegen.calls import Cost, Signature
from q35c.formats.registry import integer_format

WARP = 32
F32_BYTES = 4
EXP_OPERATIONS = 12  # of an exponential, about

Parameters = Mapping[str, Any]
Grid = tuple[CudaExtent, CudaExtent, CudaExtent]
ONE = CudaExtent(1, 0, 1)


@dataclass(frozen=True, slots=True)
class Family:
    """What makes a family's kernels, and what code generation must know of them.

    `arguments` are the PrimFunc's parameters in their order, in lower case. `writes` are the pointers that kernels of the
    family store to; one that a kernel does not take is passed over. `grid` is what the kernel itself binds its blocks to.
    """

    make: Callable[..., Any]  # parameters -> PrimFunc
    arguments: str | Callable[[Parameters], str]
    writes: str
    cost: Callable[[Parameters], Cost]
    grid: Callable[[Parameters], Grid]

    @property
    def name(self) -> str:
        return self.make.__name__

    def signature(self, parameters: Parameters) -> Signature:
        """Return what the kernel with these parameters takes and stores to."""
        names = self.arguments if isinstance(self.arguments, str) else self.arguments(parameters)
        taken = tuple(names.split())
        return Signature(taken, frozenset(self.writes.split()).intersection(taken))


def fixed(count: int) -> CudaExtent:
    """Return an axis of so many blocks, whatever the rows."""
    return CudaExtent(count, 0, 1)


def per_row(count: int = 1, over: int = 1) -> CudaExtent:
    """Return an axis of `count` blocks for each `over` rows."""
    return CudaExtent(count, 1, over)


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


# --- what rows say of bytes and operations --------------------------------------------------------


def peak_of(dtype: str) -> Literal["int8", "bf16", "f32"]:
    """Return the peak that bounds products with values stored in this format."""
    return dtype if dtype in ("bf16", "f32") else "int8"  # type: ignore[return-value]


def row_bytes(width: int, dtype: str) -> float:
    """Return the bytes of an activation row: f32, bf16, or int8 with a scale and a sum for each group."""
    if form := integer_format(dtype):
        return width + 8 * ceil_div(width, form.group)
    return width * {"f32": F32_BYTES, "bf16": 2}[dtype]


def elementwise(words: float, operations: float) -> Cost:
    """Return the cost of a formula over f32 words of each row."""
    return Cost(cached_bytes_per_token=words * F32_BYTES, operations_per_token=operations)


def weight_bytes(N: int, K: int, dtype: str) -> int:
    """Return about how many bytes a matrix has; scales do not count."""
    form = integer_format(dtype)
    return N * K * (form.bits if form else {"f32": 32, "bf16": 16}[dtype]) // 8
