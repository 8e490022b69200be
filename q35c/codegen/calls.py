"""What a program consists of: kernel calls, and barriers between them. Plain data, whatever the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from q35c.layouts.blobs import Blob


@dataclass(frozen=True, slots=True)
class Division:
    """Say into how many parts a kernel's work can be divided, and how many bytes each BLOCK_COST_ROWS rows of it are worth."""

    most: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Signature:
    """Name what a kernel takes, in order, and the pointers among it that it stores to.

    Pointers have names of their own. `tokens` is how many rows the call has, `ld_x` the row stride of `x` in elements of 4
    bytes, `worker` the thread's number; the number of the part and how many there are stand behind all of them.
    """

    arguments: tuple[str, ...]
    writes: frozenset[str]

    @property
    def pointers(self) -> tuple[str, ...]:
        """Return what a call must name; the rest follows from it."""
        scalars = ("tokens", "worker")
        return tuple(n for n in self.arguments if n not in scalars and not n.startswith("ld_"))


@dataclass(frozen=True, slots=True)
class Cost:
    """State what a call of a kernel must do at the least, as numbers that the artifact keeps; the roofline knows no more.

    - Memory bytes are those of weights, recurrent state, keys and values: too many to stay in a cache from one step to the
      next. Of its weight a token reads `weight_share`, T tokens 1 - (1 - weight_share)^T: all of a matrix, k of E experts
      as if choices were random. Weights count as they are stored; written bytes count like read ones.
    - Cached bytes are those of activations, f32 or rounded: some kernel has just written them.
    - A multiplication and an addition are two operations, bounded by the peak of the type that is multiplied. Element-wise
      formulas count roughly; they hardly ever bound.
    """

    peak: Literal["int8", "bf16", "f32"] = "f32"
    weight_share: float = 0.0
    bytes_per_sequence: float = 0.0
    bytes_per_token: float = 0.0
    bytes_per_cell: float = 0.0  # of the cells that attention reads
    cached_bytes_per_token: float = 0.0
    operations_per_token: float = 0.0
    operations_per_score: float = 0.0  # of a token and a cell that it attends to


@dataclass(frozen=True)
class Pointer:
    """Point `byte_offset` into a blob; with `last_row`, (T - 1) * row_bytes further."""

    blob: Blob
    byte_offset: int
    row_bytes: int = 0
    last_row: bool = False


@dataclass(frozen=True)
class Tokens:
    """Pass the number of tokens T of this run, or that of rows where each token has `factor`, int64."""

    factor: int = 1


@dataclass(frozen=True)
class Int:
    """Pass a constant int64."""

    value: int


@dataclass(frozen=True)
class Tid:
    """Pass the calling thread's number, int32."""


@dataclass(frozen=True)
class Nt:
    """Pass the number of threads, int32."""


@dataclass(frozen=True)
class Part:
    """Pass the number of the part that this call of a divided kernel does, int32."""


@dataclass(frozen=True)
class Parts:
    """Pass into how many parts a kernel's work is divided, int32."""


Argument = Pointer | Tokens | Int | Tid | Nt | Part | Parts


@dataclass(frozen=True)
class Call:
    """Call the kernel of this name, once on each thread or, `divided`, once for each part."""

    kernel: str
    args: tuple[Argument, ...]
    divided: Division | None = None


@dataclass(frozen=True)
class Barrier:
    """Let no thread go on before all have come here."""
