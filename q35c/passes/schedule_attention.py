"""Choose how attention keeps its keys and values."""

from __future__ import annotations

from q35c.ir.graph import Graph, Module, Rewriter
from q35c.ir.precision import Policy


def schedule_attention(module: Module, policy: Policy) -> Module:
    """Let attention round keys and values to the type of the policy's cache.

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
          %0: f32[T, 8] = quantized_gated_attention(%q, %k, %v, @q_norm, @k_norm, %table,
              %slots, %starts, $keys, $values) {cache = "int8", eps = 1e-06,
              heads = 2, kv_heads = 1, rows = "sequence", scale = 0.5}
          return %0
        }

    The state keeps its type, f32, which is that of the values in it. A cache in f32 rounds nothing: attention stays as it is.
    """
    return Module(tuple(schedule_entry(graph, policy.cache) for graph in module))


def schedule_entry(graph: Graph, cache: str) -> Graph:
    out = Rewriter(graph, stage="scheduled")
    for op in graph.ops:
        if op.kind != "stateful_gated_attention" or cache == "f32":
            out.copy(op)
            continue
        operands = map(out.new, op.operands)
        attrs = {**op.attrs.to_dict(), "cache": cache}
        out.replace(op.result, out.emit("quantized_gated_attention", *operands, **attrs))
    return out.done()
