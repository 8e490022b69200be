"""What lowering produces: kernel calls over named buffers, and where everything ends up.

A `Step` is one kernel call. Its arguments name buffers, packed weights, io fields or state; `place`
turns them into offsets of the five blobs and puts a barrier where one step needs another's result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from q35c.codegen.calls import (
    Argument,
    Barrier,
    Call,
    Division,
    Int,
    Nt,
    Part,
    Parts,
    Pointer,
    Tid,
    Tokens,
)
from q35c.codegen.plan_memory import Lifetime, MemoryPlan, plan_memory
from q35c.layouts.blobs import BARRIER_BYTES


@dataclass(frozen=True, slots=True)
class Buffer:
    """A temporary in the arena, large enough for the entry's most tokens."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class View:
    """Rows of a buffer or io field: a byte offset, the row stride in f32 elements, who owns the rows."""

    home: Buffer | str  # a buffer, or the name of an io field
    stride: int
    rows: Tokens | Int
    offset: int = 0
    last_row: bool = False

    def split(self, pairs: int) -> View:
        """Return the same rows as `pairs` shorter ones each, side by side."""
        return replace(self, stride=self.stride // pairs)


@dataclass(frozen=True, slots=True)
class WeightRef:
    """A packed weight by name."""

    name: str


@dataclass(frozen=True, slots=True)
class StateRef:
    """State tensors that a kernel finds from a byte offset in a sequence's region on; it adds the slot's offset."""

    offset: int
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Counters behind the barrier's words, zero between kernels; all kernels use the same."""


StepArgument = View | WeightRef | StateRef | Arrivals | Tokens | Int | Tid


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel call; number and count of the parts of its work are appended to the arguments when it is placed."""

    kernel: str
    args: tuple[StepArgument, ...]
    reads: tuple[View, ...]
    writes: tuple[View, ...]
    state: tuple[str, ...] = ()  # state tensors read or written
    divided: Division | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """Byte offsets of what programs point to."""

    weights: Mapping[str, int]
    io: Mapping[str, tuple[int, int]]  # offset, bytes


@dataclass(slots=True)
class Schedule:
    """The steps of one entry in order."""

    name: str
    steps: list[Step] = field(default_factory=list)

    def plan(self) -> MemoryPlan:
        """Place the buffers by their first and last use."""
        seen: dict[str, Lifetime] = {}
        for number, step in enumerate(self.steps):
            for view in (*step.reads, *step.writes):
                if isinstance(view.home, Buffer):
                    first = seen[view.home.name].first if view.home.name in seen else number
                    seen[view.home.name] = Lifetime(view.home.name, view.home.bytes, first, number)
        return plan_memory(seen.values())

    def place(self, plan: MemoryPlan, places: Places) -> list[Call | Barrier]:
        """Return the program: calls with final offsets, barriers only where a hazard needs one."""
        program: list[Call | Barrier] = []
        hazards = Hazards(plan, places)
        for step in self.steps:
            if hazards.need_barrier(step):
                program.append(Barrier())
            args = [resolve(argument, plan, places) for argument in step.args]
            part = (Part(), Parts()) if step.divided else (Tid(), Nt())
            program.append(Call(step.kernel, (*args, *part), step.divided))
        return program


def resolve(argument: StepArgument, plan: MemoryPlan, places: Places) -> Argument:
    """Turn a step's argument into a program's."""
    if isinstance(argument, WeightRef):
        return Pointer("weights", places.weights[argument.name])
    if isinstance(argument, StateRef):
        return Pointer("state", argument.offset)
    if isinstance(argument, Arrivals):
        return Pointer("barrier", BARRIER_BYTES)
    if not isinstance(argument, View):
        return argument
    blob, start, _ = extent_of(argument, plan, places)
    return Pointer(blob, start + argument.offset, argument.stride * 4, argument.last_row)  # type: ignore[arg-type]


def extent_of(view: View, plan: MemoryPlan, places: Places) -> tuple[str, int, int]:
    """Return (blob, first byte, end byte) of the buffer or field behind a view."""
    if isinstance(view.home, Buffer):
        start = plan.offsets[view.home.name]
        return "arena", start, start + view.home.bytes
    offset, size = places.io[view.home]
    return "io", offset, offset + size


class Hazards:
    """Track what was read and written since the last barrier."""

    def __init__(self, plan: MemoryPlan, places: Places) -> None:
        self.plan, self.places = plan, places
        self.read: set[tuple[str, int, int]] = set()
        self.written: set[tuple[str, int, int]] = set()

    def need_barrier(self, step: Step) -> bool:
        """Tell whether the step must wait for others, and note what it touches."""
        reads = {extent_of(view, self.plan, self.places) for view in step.reads}
        writes = {extent_of(view, self.plan, self.places) for view in step.writes}
        writes |= {(f"state {name}", 0, 1) for name in step.state}
        writes |= {("arrivals", 0, 1) for argument in step.args if isinstance(argument, Arrivals)}
        needed = (
            overlap(reads, self.written)
            or overlap(writes, self.written)
            or overlap(writes, self.read)
        )
        if needed:
            self.read, self.written = set(), set()
        self.read |= reads
        self.written |= writes
        return needed


def overlap(a: set[tuple[str, int, int]], b: set[tuple[str, int, int]]) -> bool:
    return any(x[0] == y[0] and x[1] < y[2] and y[1] < x[2] for x in a for y in b)
