"""Let rows that are given, of images and clips, stand in place of tokens."""

from __future__ import annotations

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op
from q35c.ir.types import SymDim


def accept_rows(graph: Graph) -> Graph:
    """Give the model an input `rows` f32[T, H]: row t of it is taken where token t is negative.

    Before:
        graph g fused {
          input %tokens: i32[T]
          weight @table: f32[7, 4]
          %0: f32[T, 4] = embedding(%tokens, @table)
          return %0
        }
    After:
        graph g fused {
          input %tokens: i32[T]
          input %rows: f32[T, 4]
          weight @table: f32[7, 4]
          %0: f32[T, 4] = embedding_or_rows(%tokens, @table, %rows)
          return %0
        }

    A table that something else than the tokens [T] that come in is looked up in stays as it is.
    """
    if not any(embeds_tokens(graph, op) for op in graph.ops):
        return graph
    out = Rewriter(graph)
    for op in graph.ops:
        if embeds_tokens(graph, op):
            rows = out.input("rows", op.result.type)
            out.replace(op.result, out.emit("embedding_or_rows", *op.operands, rows))
        else:
            out.copy(op)
    return out.done()


def embeds_tokens(graph: Graph, op: Op) -> bool:
    """Tell whether an op looks up the embeddings of the graph's tokens."""
    if op.kind != "embedding" or op["tokens"] not in graph.inputs:
        return False
    return op["tokens"].type.shape == (SymDim("T"),)
