"""Split one stateful graph into the entries that the runtime calls."""

from __future__ import annotations

from dataclasses import replace

from q35c.ir.graph import Graph, Module, Rewriter, Value, producers
from q35c.ir.types import SymDim, TensorType

SEQUENCES = SymDim("B")
ROW_WISE = ("linear", "rms_norm")  # their rows do not mix, and operand 0 alone has rows


def split_entries(graph: Graph) -> Module:
    """Return the entries prefill, decode and score.

    `prefill`: T tokens of one sequence, logits of the last one only. `decode`: one token of each of B
    sequences. `score`: T tokens of one sequence, logits of all.
    """
    return Module((as_prefill(graph), as_decode(graph), replace(graph, name="score")))


def as_prefill(graph: Graph) -> Graph:
    """Take the last token before the row-wise tail (final norm and head) instead of after it."""
    (logits,) = graph.outputs
    made_by = producers(graph)
    cut = logits
    while (op := made_by.get(cut)) is not None and op.kind in ROW_WISE:
        cut = op.operands[0]
    out = Rewriter(graph, name="prefill")
    for op in graph.ops:
        out.copy(op)
        if cut in op.results:
            out.replace(cut, out.emit("last_token", out.new(cut)))
    return out.done()


def as_decode(graph: Graph) -> Graph:
    """Let every row be the one new token of its own sequence."""
    inputs = {value: Value(value.name, per_sequence(value)) for value in graph.inputs}
    out = Rewriter(replace(graph, inputs=tuple(inputs.values())), name="decode")
    for old, new in inputs.items():
        out.replace(old, new)
    for op in graph.ops:
        attrs = op.attrs.to_dict()
        if "rows" in attrs:
            attrs["rows"] = "batch"
        results = out.append(op.kind, tuple(map(out.new, op.operands)), type(op.attrs).of(attrs))
        for old, new in zip(op.results, results, strict=True):
            out.replace(old, new)
    return out.finish(map(out.new, graph.outputs))


def per_sequence(value: Value) -> TensorType:
    """Return the input's type in decode: T rows become B rows, one sequence becomes B."""
    if value.name in ("slots", "starts"):
        return TensorType(value.type.dtype, (SEQUENCES,))
    dims = (SEQUENCES * d.factor if isinstance(d, SymDim) and d.name == "T" else d for d in value.type.shape)
    return TensorType(value.type.dtype, tuple(dims))
