"""Types of the IR: element types, dimensions (an integer or a scaled symbol), tensor types."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DType = Literal["f32", "bf16", "u8", "i32", "i64"]
DTYPE_BYTES: dict[str, int] = {"f32": 4, "bf16": 2, "u8": 1, "i32": 4, "i64": 8}


@dataclass(frozen=True, slots=True)
class SymDim:
    """A dimension known only at run time: `factor` times the symbol `name`."""

    name: str
    factor: int = 1

    def __mul__(self, other: int) -> SymDim:
        return SymDim(self.name, self.factor * other)

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> SymDim:
        quotient, remainder = divmod(self.factor, other)
        if remainder:
            raise ValueError(f"{self} is not a multiple of {other}")
        return SymDim(self.name, quotient)

    def __str__(self) -> str:
        return self.name if self.factor == 1 else f"{self.factor}*{self.name}"


Dim = int | SymDim
Shape = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class TensorType:
    """An element type and a shape; `()` is a scalar."""

    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def rank(self) -> int:
        return len(self.shape)


def static(dim: Dim) -> int:
    """Return a dimension that must be a number; TypeError if it is a symbol."""
    if isinstance(dim, SymDim):
        raise TypeError(f"{dim} is known only at run time")
    return dim


def count(shape: Shape, sizes: dict[str, int] | None = None) -> int:
    """Return the number of elements; symbols are looked up in `sizes` (KeyError if absent)."""
    return math.prod(extent(dim, sizes) for dim in shape)


def extent(dim: Dim, sizes: dict[str, int] | None = None) -> int:
    """Return a dimension as an integer; symbols are looked up in `sizes` (KeyError if absent)."""
    return dim if isinstance(dim, int) else dim.factor * (sizes or {})[dim.name]


def size_bytes(tensor: TensorType, sizes: dict[str, int] | None = None) -> int:
    """Return the bytes of a dense tensor of this type."""
    return count(tensor.shape, sizes) * DTYPE_BYTES[tensor.dtype]
