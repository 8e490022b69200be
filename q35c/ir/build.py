"""Build graphs: op by op, or from an old one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from q35c.ir.graph import Attr, Attrs, Graph, Op, Value
from q35c.ir.ops import OPS
from q35c.ir.types import TensorType
from q35c.ir.verify import infer_types, verify


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
        types = infer_types(kind, tuple(operands), attrs, self.stage, self.name)
        base = len(self._ops)
        names = [f"{base}" if len(types) == 1 else f"{base}.{i}" for i in range(len(types))]
        results = tuple(Value(n, t) for n, t in zip(names, types, strict=True))
        self._ops.append(Op(kind, tuple(operands), attrs, results))
        return results

    def finish(self, outputs: Iterable[Value]) -> Graph:
        """Drop what no output or state needs, number the values in order, verify, return."""
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
