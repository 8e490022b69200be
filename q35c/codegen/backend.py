"""What code generation needs from a kind of machine. A backend is a folder here, named once in `targets.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from q35c.codegen.calls import Barrier, Call, Cost, Division, Pointer, Signature
from q35c.layouts.cache import CacheLayout
from q35c.layouts.rows import RowLayout

if TYPE_CHECKING:
    from q35c.codegen.pack import Pack, PackedWeight
    from q35c.codegen.requests import Shared
    from q35c.codegen.schedule import Schedule
    from q35c.ir.graph import Graph

Parameters = tuple[tuple[str, Any], ...]
KernelKey = tuple[str, Parameters]  # family and what its generator takes, sorted by name
Program = Sequence[Call | Barrier]
Progress = Callable[[str, float], None]  # stage, fraction done
Load = Callable[[bytes], Any]  # a shared object -> its library


@dataclass(frozen=True, slots=True)
class Built:
    """The code of a model, and what the manifest says of it: its probes, its target; and what else becomes a segment."""

    code: bytes
    probes: list[dict[str, Any]]
    target: dict[str, Any]
    segments: Mapping[str, bytes] = field(default_factory=dict)


class Backend(Protocol):
    """One machine that code is generated for."""

    @property
    def name(self) -> str:
        """The target's canonical name, as `cpu:x86-64-v3`."""
        ...

    @property
    def max_threads(self) -> int:
        """The most threads that may run a program; bounds the scratch in the arena."""
        ...

    @property
    def has_towers(self) -> bool:
        """Whether there are kernels for vision towers."""
        ...

    @property
    def prefill_tokens(self) -> int:
        """Rows per prefill call: enough for full tiles, small in memory."""
        ...

    @property
    def logits_bytes(self) -> int:
        """The most bytes of logits that a score call writes."""
        ...

    def cache_layout(self, dtype: str) -> CacheLayout:
        """Return how keys and values of this type lie in the state."""
        ...

    def row_layout(self, dtype: str) -> RowLayout:
        """Return how rows rounded to this type lie in the arena."""
        ...

    def decode_splits(self, kv_heads: int, context: int) -> int:
        """Return into how many parts a decode step splits the cells of one key head."""
        ...

    def signature(self, family: str, parameters: Mapping[str, Any]) -> Signature:
        """Return what a kernel takes and stores to. Raises LoweringError for a family that does not exist."""
        ...

    def cost(self, family: str, parameters: Mapping[str, Any]) -> Cost:
        """Return what calls of a kernel must do at the least."""
        ...

    def scratch_bytes(self, family: str, max_tokens: int, parameters: Mapping[str, Any]) -> int:
        """Return the bytes of scratch that a kernel needs for all threads and rows."""
        ...

    def division(self, family: str, parameters: Mapping[str, Any]) -> Division | None:
        """Return how to divide a kernel's work, or None if it is never worth it."""
        ...

    def check_tools(self) -> None:
        """Raise ToolchainError, before minutes of work, where a program that building needs is missing."""
        ...

    def lower(self, graph: Graph, shared: Shared, max_tokens: int) -> Schedule:
        """Return the kernel calls of an entry of up to `max_tokens` rows."""
        ...

    def build(
        self,
        kernels: Mapping[KernelKey, str],
        programs: Mapping[str, Program],
        clock: Pointer,
        progress: Progress,
    ) -> Built:
        """Generate the kernels, the entries that call them, and the probes; return their machine code."""
        ...

    def packer(self, weights: Iterable[PackedWeight], load: Load) -> Pack:
        """Return what packs rows on the machine that compiles, compiled itself where that is worth it."""
        ...
