"""Split one stateful graph into the entries that the runtime calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from q35c.ir.graph import Attrs, Graph, Module, Rewriter, Value, producers, use_counts
from q35c.ir.types import SymDim, TensorType

SEQUENCES = SymDim("B")
ROW_WISE = ("linear", "rms_norm")  # their rows do not mix, and operand 0 alone has rows


def split_entries(graph: Graph) -> Module:
    """Return the entries prefill, decode and score.

    `prefill`: T tokens of one sequence, logits of the last one only. `decode`: one token of each of B
    sequences. `score`: T tokens of one sequence, logits of all.

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
    """
    return Module((as_prefill(graph), as_decode(graph), replace(graph, name="score")))


def as_prefill(graph: Graph) -> Graph:
    """Take the last token before the row-wise tail (final norm and head) instead of after it."""
    (cut,) = graph.outputs
    made_by, uses = producers(graph), use_counts(graph)
    while (op := made_by.get(cut)) is not None and op.kind in ROW_WISE:
        rows = op.operands[0]
        if rows not in made_by or uses[rows] != 1:  # another reader would lose its other rows
            break
        cut = rows
    out = Rewriter(graph, name="prefill")
    for op in graph.ops:
        out.copy(op)
        if cut in op.results:
            out.replace(cut, out.emit("last_token", out.new(cut)))
    return out.done()


def as_decode(graph: Graph) -> Graph:
    """Let every row be the one new token of its own sequence."""
    inputs = {value: Value(value.name, decode_type(value)) for value in graph.inputs}
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


def decode_type(value: Value) -> TensorType:
    """Return an input's type in decode: one sequence becomes B, each with one row."""
    if value.name in ("slots", "starts"):
        return TensorType(value.type.dtype, (SEQUENCES,))
    return TensorType(value.type.dtype, per_sequence(value.type.shape))


def per_sequence(attr: Any) -> Any:
    """Return a dimension or attribute of decode: T rows become B rows."""
    if isinstance(attr, tuple):
        return tuple(map(per_sequence, attr))
    return SEQUENCES * attr.factor if isinstance(attr, SymDim) and attr.name == "T" else attr
