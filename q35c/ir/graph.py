"""The graph: a list of ops in SSA form over typed values. All nodes are frozen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from q35c.ir.ops import OPS
from q35c.ir.types import Dim, TensorType

ValueKind = Literal["value", "weight", "state"]
SIGILS: dict[str, str] = {"value": "%", "weight": "@", "state": "$"}
Attr = int | float | str | bool | Dim | tuple["Attr", ...]

STAGES = ("traced", "fused", "stateful", "quantized", "scheduled")


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor: computed (`%`), a named constant of the checkpoint (`@`) or mutable state (`$`)."""

    name: str
    type: TensorType
    kind: ValueKind = "value"

    def __str__(self) -> str:
        return SIGILS[self.kind] + self.name


class Attrs(tuple[tuple[str, Attr], ...]):
    """Attributes of an op: an immutable, ordered, hashable mapping."""

    __slots__ = ()

    @classmethod
    def of(cls, items: Mapping[str, Attr]) -> Attrs:
        return cls(sorted(items.items()))

    def __getitem__(self, key: Any) -> Any:
        for name, value in self:
            if name == key:
                return value
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        return next((value for name, value in self if name == key), default)

    def to_dict(self) -> dict[str, Any]:
        return dict(iter(self))


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: `results = kind(operands) {attrs}`."""

    kind: str
    operands: tuple[Value, ...]
    attrs: Attrs
    results: tuple[Value, ...]

    def named(self) -> Iterator[tuple[str, Value]]:
        """Yield each operand with its name in the op table; one that repeats comes several times."""
        names = OPS[self.kind].operands
        repeated = itertools.chain(names, itertools.repeat(names[-1] if names else ""))
        return zip(repeated, self.operands, strict=False)

    def __getitem__(self, name: str) -> Value:
        """Return the operand of that name; of one that repeats, the first."""
        return self.operands[OPS[self.kind].operands.index(name)]

    def playing(self, role: str) -> tuple[Value, ...]:
        """Return the operands that have a role in the op table: `row_wise`, `factors` or `per_sequence`."""
        names = getattr(OPS[self.kind], role)
        return tuple(value for name, value in self.named() if name in names)

    @property
    def source(self) -> Value:
        """Return the first operand: what the op works on."""
        return self.operands[0]

    @property
    def result(self) -> Value:
        (only,) = self.results
        return only


@dataclass(frozen=True, slots=True)
class Graph:
    """A function from inputs, weights and state to outputs (and new state)."""

    name: str
    stage: str
    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]

    def leaves(self, kind: ValueKind) -> tuple[Value, ...]:
        """Return the distinct weights or states that the ops read, in order of first use."""
        found = {v: None for op in self.ops for v in op.operands if v.kind == kind}
        return tuple(found)

    def with_stage(self, stage: str) -> Graph:
        return replace(self, stage=stage)


@dataclass(frozen=True, slots=True)
class Module:
    """The entries of one model; they share weights and state by name."""

    entries: tuple[Graph, ...]

    def __iter__(self) -> Iterator[Graph]:
        return iter(self.entries)

    def map(self, step: Callable[[Graph], Graph]) -> Module:
        """Return the module with every entry changed by `step`."""
        return Module(tuple(map(step, self.entries)))

    def map_to_several(self, step: Callable[[Graph], Module]) -> Module:
        """Return the module with every entry replaced by those that `step` makes of it."""
        return Module(tuple(made for entry in self.entries for made in step(entry)))


def producers(graph: Graph) -> dict[Value, Op]:
    """Map each computed value to the op that makes it."""
    return {result: op for op in graph.ops for result in op.results}


def use_counts(graph: Graph) -> dict[Value, int]:
    """Count how often each value is read, graph outputs included."""
    counts: dict[Value, int] = {}
    for value in (*(v for op in graph.ops for v in op.operands), *graph.outputs):
        counts[value] = counts.get(value, 0) + 1
    return counts
