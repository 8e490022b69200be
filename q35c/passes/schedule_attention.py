"""Choose how attention keeps its keys and values, and into how many parts it splits them."""

from __future__ import annotations

from collections.abc import Callable

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Module


def schedule_attention(
    module: Module, cache: str, decode_splits: Callable[[int], int], picture_cache: str
) -> Module:
    """Let attention round keys and values to the type of the cache, and split them where rows are few.

    Before:
        graph g quantized {
          input %q: f32[T, 16]
          input %k: f32[T, 4]
          input %v: f32[T, 4]
          input %table: f32[T, 2]
          input %slots: i64[1]
          input %starts: i32[1]
          weight @q_norm: f32[4]
          weight @k_norm: f32[4]
          state $keys: f32[B, CTX, 1, 4]
          state $values: f32[B, CTX, 1, 4]
          %0: f32[T, 8] = stateful_gated_attention(%q, %k, %v, @q_norm, @k_norm, %table,
              %slots, %starts, $keys, $values)
              {eps = 1e-06, heads = 2, kv_heads = 1, rows = "sequence", scale = 0.5}
          return %0
        }
    After:
        graph g scheduled {
          input %q: f32[T, 16]
          input %k: f32[T, 4]
          input %v: f32[T, 4]
          input %table: f32[T, 2]
          input %slots: i64[1]
          input %starts: i32[1]
          weight @q_norm: f32[4]
          weight @k_norm: f32[4]
          state $keys: f32[B, CTX, 1, 4]
          state $values: f32[B, CTX, 1, 4]
          %0: f32[T, 8] = scheduled_gated_attention(%q, %k, %v, @q_norm, @k_norm, %table,
              %slots, %starts, $keys, $values) {cache = "int8", eps = 1e-06,
              heads = 2, kv_heads = 1, rows = "sequence", scale = 0.5, splits = 1}
          return %0
        }

    The state keeps its type, f32, which is that of the values in it. One token of each of some sequences (rows "batch") is
    few rows: there `decode_splits` says of a number of key heads how many parts the cells of one make. Attention over a
    picture keeps its keys and values in a type of its own.
    """

    def schedule_entry(graph: Graph) -> Graph:
        out = Rewriter(graph, stage="scheduled")
        for op in graph.ops:
            if op.kind == "picture_attention":
                attrs = {**op.attrs.to_dict(), "cache": picture_cache}
                made = out.emit(f"scheduled_{op.kind}", *map(out.new, op.operands), **attrs)
                out.replace(op.result, made)
                continue
            if op.kind != "stateful_gated_attention":
                out.copy(op)
                continue
            splits = decode_splits(op.attrs["kv_heads"]) if op.attrs["rows"] == "batch" else 1
            attrs = {**op.attrs.to_dict(), "cache": cache, "splits": splits}
            operands = map(out.new, op.operands)
            out.replace(op.result, out.emit("scheduled_gated_attention", *operands, **attrs))
        return out.done()

    return module.map(schedule_entry)
