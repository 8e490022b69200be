"""Small helpers for matching structure in a graph. Names of values are never looked at."""

from __future__ import annotations

from q35c.ir.graph import Graph, Op, Value, producers, use_counts


class Matcher:
    """Answer questions about who makes a value, in one graph."""

    def __init__(self, graph: Graph) -> None:
        self.producers = producers(graph)
        self.uses = use_counts(graph)

    def op(self, value: Value | None, kind: str, **attrs) -> Op | None:
        """Return the op that makes `value` if it is of this kind and has these attributes."""
        made_by = self.producers.get(value) if value is not None else None
        if made_by is None or made_by.kind != kind:
            return None
        return made_by if all(made_by.attrs[name] == want for name, want in attrs.items()) else None

    def source(self, value: Value | None, kind: str, **attrs) -> Value | None:
        """Return the first operand of the op that makes `value`, under the same conditions."""
        op = self.op(value, kind, **attrs)
        return op.source if op else None

    def either(self, value: Value | None, kind: str) -> list[tuple[Value, Value]]:
        """Return the operands of a commutative op in both orders; nothing if it is another op."""
        op = self.op(value, kind)
        if op is None:
            return []
        a, b = op.operands
        return [(a, b), (b, a)]

    def through(self, value: Value, *kinds: str) -> Value:
        """Look through one-operand ops of these kinds."""
        while (op := self.producers.get(value)) is not None and op.kind in kinds:
            value = op.source
        return value

    def over_last_axis(self, value: Value | None, kind: str) -> Value | None:
        """Return the first operand of a reduction or softmax over its last axis."""
        op = self.op(value, kind)
        return op.source if op is not None and is_last_axis(op) else None

    def last_axis_slice(self, value: Value | None) -> tuple[Value, int, int] | None:
        """Return (source, start, stop) of a step-1 slice of the last axis."""
        op = self.op(value, "slice", step=1)
        if op is None or not is_last_axis(op):
            return None
        return op.source, op.attrs["start"], op.attrs["stop"]

    def joined(self, value: Value | None) -> tuple[Value, ...]:
        """Return the operands of a concat along the last axis; nothing if it is another op."""
        op = self.op(value, "concat")
        return op.operands if op is not None and is_last_axis(op) else ()


def is_weight(value: Value) -> bool:
    return value.kind == "weight"


def is_last_axis(op: Op) -> bool:
    """Tell whether the op works along the last axis of its first operand."""
    rank = op.source.type.rank
    return op.attrs["axis"] % rank == rank - 1
