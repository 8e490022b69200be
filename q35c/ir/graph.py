"""The graph: a list of ops in SSA form over typed values. All nodes are frozen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def producers(graph: Graph) -> dict[Value, Op]:
    """Map each computed value to the op that makes it."""
    return {result: op for op in graph.ops for result in op.results}


def use_counts(graph: Graph) -> dict[Value, int]:
    """Count how often each value is read, graph outputs included."""
    counts: dict[Value, int] = {}
    for value in (*(v for op in graph.ops for v in op.operands), *graph.outputs):
        counts[value] = counts.get(value, 0) + 1
    return counts


class Builder:
    """Build a graph op by op; every op is checked against the op table when it is emitted."""

    def __init__(self, name: str, stage: str) -> None:
        self.name, self.stage = name, stage
        self._inputs: list[Value] = []
        self._ops: list[Op] = []

    def input(self, name: str, type: TensorType) -> Value:
        self._inputs.append(value := Value(name, type))
        return value

    def weight(self, name: str, type: TensorType) -> Value:
        return Value(name, type, "weight")

    def state(self, name: str, type: TensorType) -> Value:
        return Value(name, type, "state")

    def emit(self, kind: str, *operands: Value, **attrs: Attr) -> Any:
        """Append an op and return its result, or a tuple of results where it has several."""
        results = self.append(kind, operands, Attrs.of(attrs))
        return results[0] if len(results) == 1 else results

    def append(self, kind: str, operands: Sequence[Value], attrs: Attrs) -> tuple[Value, ...]:
        """Append an op with ready attributes and return all its results."""
        from q35c.ir.verify import infer_types

        types = infer_types(kind, tuple(operands), attrs, self.stage, self.name)
        base = len(self._ops)
        names = [f"{base}" if len(types) == 1 else f"{base}.{i}" for i in range(len(types))]
        results = tuple(Value(n, t) for n, t in zip(names, types, strict=True))
        self._ops.append(Op(kind, tuple(operands), attrs, results))
        return results

    def finish(self, outputs: Iterable[Value]) -> Graph:
        """Drop what no output or state needs, number the values in order, verify, return."""
        from q35c.ir.verify import verify

        graph = Graph(self.name, self.stage, tuple(self._inputs), tuple(self._ops), tuple(outputs))
        return verify(renumber(drop_dead(graph)))


class Rewriter(Builder):
    """Build a new graph from an old one: copy ops, replace values, keep the rest."""

    def __init__(self, graph: Graph, stage: str | None = None, name: str | None = None) -> None:
        super().__init__(name or graph.name, stage or graph.stage)
        self.graph = graph
        self._inputs = list(graph.inputs)
        self._new: dict[Value, Value] = {}

    def new(self, value: Value) -> Value:
        """Return what stands for an old value in the new graph."""
        return self._new.get(value, value)

    def replace(self, old: Value, new: Value) -> None:
        """Let all later readers of the old value read the new one."""
        self._new[old] = new

    def copy(self, op: Op) -> tuple[Value, ...]:
        """Append an old op with its operands replaced."""
        results = self.append(op.kind, tuple(map(self.new, op.operands)), op.attrs)
        for old, new in zip(op.results, results, strict=True):
            self.replace(old, new)
        return results

    def done(self) -> Graph:
        """Finish with the old graph's outputs."""
        return self.finish(map(self.new, self.graph.outputs))


def drop_dead(graph: Graph) -> Graph:
    """Remove ops whose results nobody reads and that change no state."""
    needed = set(graph.outputs)
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if OPS[op.kind].writes_state or any(result in needed for result in op.results):
            kept.append(op)
            needed.update(op.operands)
    return replace(graph, ops=tuple(reversed(kept)))


def renumber(graph: Graph) -> Graph:
    """Name computed values by their position, so that equal graphs print equally."""
    names: dict[Value, Value] = {}
    ops: list[Op] = []
    number = 0
    for op in graph.ops:
        results = []
        for old in op.results:
            names[old] = Value(str(number), old.type)
            results.append(names[old])
            number += 1
        operands = tuple(names.get(v, v) for v in op.operands)
        ops.append(Op(op.kind, operands, op.attrs, tuple(results)))
    outputs = tuple(names.get(v, v) for v in graph.outputs)
    return replace(graph, ops=tuple(ops), outputs=outputs)
