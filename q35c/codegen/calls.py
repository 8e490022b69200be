"""What a program consists of: kernel calls, and barriers between them. Plain data, whatever the machine."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Pointer:
    """Point `byte_offset` into a blob; with `last_row`, (T - 1) * row_bytes further."""

    blob: Blob
    byte_offset: int
    row_bytes: int = 0
    last_row: bool = False


@dataclass(frozen=True)
class Tokens:
    """Pass the number of tokens T of this run, int64."""


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
