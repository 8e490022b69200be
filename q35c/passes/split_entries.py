"""Split one stateful graph into the entries that the runtime calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from q35c.ir.build import Rewriter, drop_dead, renumber
from q35c.ir.graph import Attrs, Graph, Module, Value
from q35c.ir.ops import OPS
from q35c.ir.types import SymDim, TensorType

SEQUENCES = SymDim("B")


def split_entries(graph: Graph) -> Module:
    """Return the entries prefill, decode, score and extend.

    `prefill`: T tokens of one sequence, logits of the last one only. `decode`: one token of each of B
    sequences. `score`: T tokens of one sequence, logits of all. `extend`: T tokens of one sequence, no logits: all of
    a long prompt but its end.

    Before:
        graph forward stateful {
          input %tokens: i32[T]
          weight @table: f32[7, 4]
          %0: f32[T, 4] = embedding(%tokens, @table)
          %1: f32[T, 7] = linear(%0, @table)
          return %1
        }
    After:
        graph prefill stateful {
          input %tokens: i32[T]
          weight @table: f32[7, 4]
          %0: f32[T, 4] = embedding(%tokens, @table)
          %1: f32[1, 4] = last_token(%0)
          %2: f32[1, 7] = linear(%1, @table)
          return %2
        }

        graph decode stateful {
          input %tokens: i32[B]
          weight @table: f32[7, 4]
          %0: f32[B, 4] = embedding(%tokens, @table)
          %1: f32[B, 7] = linear(%0, @table)
          return %1
        }

        graph score stateful {
          input %tokens: i32[T]
          weight @table: f32[7, 4]
          %0: f32[T, 4] = embedding(%tokens, @table)
          %1: f32[T, 7] = linear(%0, @table)
          return %1
        }

        graph extend stateful {
          input %tokens: i32[T]
          return
        }

    A graph that reads bytes, those of a picture, is an entry already.
    """
    if any(value.type.dtype == "u8" for value in graph.inputs):
        return Module((graph,))
    score = replace(graph, name="score")
    extend = renumber(drop_dead(replace(graph, name="extend", outputs=())))
    return Module((as_prefill(graph), as_decode(graph), score, extend))


def as_prefill(graph: Graph) -> Graph:
    """Keep the last token's row alone of all that no op which mixes rows reads: of what follows the last mixer."""
    whole = needed_whole(graph)
    out = Rewriter(graph, name="prefill")
    last: dict[Value, Value] = {}

    def last_row(value: Value) -> Value:
        if value not in last:
            last[value] = out.emit("last_token", out.new(value))
        return last[value]

    for op in graph.ops:
        if whole.intersection(op.results):
            out.copy(op)
            continue
        rows = OPS[op.kind].row_wise
        operands = (last_row(v) if name in rows else out.new(v) for name, v in op.named())
        last[op.result] = out.append(op.kind, tuple(operands), op.attrs)[0]
    return out.finish([last_row(value) for value in graph.outputs])


def needed_whole(graph: Graph) -> set[Value]:
    """Return the values of which all rows are needed: an op that mixes rows makes or reads them, or depends on them."""
    whole: set[Value] = set()
    for op in reversed(graph.ops):
        rows = OPS[op.kind].row_wise if op.results[0].type.shape[0] == SymDim("T") else ()
        if not rows or whole.intersection(op.results):
            whole.update(op.results)
            rows = ()
        whole.update(value for name, value in op.named() if name not in rows)
    return whole


def as_decode(graph: Graph) -> Graph:
    """Let every row be the one new token of its own sequence."""
    named = {value for op in graph.ops for value in op.playing("per_sequence")}
    inputs = {v: Value(v.name, decode_type(v, v in named)) for v in graph.inputs}
    out = Rewriter(replace(graph, inputs=tuple(inputs.values())), name="decode")
    for old, new in inputs.items():
        out.replace(old, new)
    for op in graph.ops:
        attrs = {name: per_sequence(attr) for name, attr in op.attrs}
        if "rows" in attrs:
            attrs["rows"] = "batch"
        results = out.append(op.kind, tuple(map(out.new, op.operands)), Attrs.of(attrs))
        for old, new in zip(op.results, results, strict=True):
            out.replace(old, new)
    return out.finish(map(out.new, graph.outputs))


def decode_type(value: Value, is_per_sequence: bool) -> TensorType:
    """Return an input's type in decode: one sequence becomes B, each with one row."""
    if is_per_sequence:
        return TensorType(value.type.dtype, (SEQUENCES,))
    return TensorType(value.type.dtype, per_sequence(value.type.shape))


def per_sequence(attr: Any) -> Any:
    """Return a dimension or attribute of decode: T rows become B rows."""
    if isinstance(attr, tuple):
        return tuple(map(per_sequence, attr))
    return SEQUENCES * attr.factor if isinstance(attr, SymDim) and attr.name == "T" else attr
