"""Introduce conv, delta and key/value state: the traced graph has none."""

from __future__ import annotations

import itertools

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.ir.types import SymDim, TensorType, static
from q35c.ir.verify import verify

SEQUENCES, CONTEXT = SymDim("B"), SymDim("CTX")


def introduce_state(graph: Graph) -> Graph:
    """Let each mixer continue the sequence named by `slots`, which holds `starts` tokens already.

    Before:
        graph g fused {
          input %q: f32[T, 16]
          input %k: f32[T, 4]
          input %v: f32[T, 4]
          input %table: f32[T, 2]
          weight @q_norm: f32[4]
          weight @k_norm: f32[4]
          %0: f32[T, 8] = gated_attention(%q, %k, %v, @q_norm, @k_norm, %table)
              {eps = 1e-06, heads = 2, kv_heads = 1, scale = 0.5}
          return %0
        }
    After:
        graph g stateful {
          input %q: f32[T, 16]
          input %k: f32[T, 4]
          input %v: f32[T, 4]
          input %table: f32[T, 2]
          input %slots: i64[1]
          input %starts: i32[1]
          weight @q_norm: f32[4]
          weight @k_norm: f32[4]
          state $attention.0.keys: f32[B, CTX, 1, 4]
          state $attention.0.values: f32[B, CTX, 1, 4]
          %0: f32[T, 8] = stateful_gated_attention(%q, %k, %v, @q_norm, @k_norm, %table,
              %slots, %starts, $attention.0.keys, $attention.0.values)
              {eps = 1e-06, heads = 2, kv_heads = 1, rows = "sequence", scale = 0.5}
          return %0
        }

    gated_delta_net likewise gets its conv state [B, K-1, C] and its recurrent state
    [B, Hv, Dk, Dv]. Mixers are numbered by kind; without any the graph stays as it is. A
    traced mixer that was not fused has no stateful form: VerifyError.
    """
    numbers = {"gated_delta_net": itertools.count(), "gated_attention": itertools.count()}
    if numbers.keys().isdisjoint(op.kind for op in graph.ops):
        return verify(graph.with_stage("stateful"))
    out = Rewriter(graph, stage="stateful")
    slots = out.input("slots", TensorType("i64", (1,)))
    starts = out.input("starts", TensorType("i32", (1,)))
    for op in graph.ops:
        if op.kind not in numbers:
            out.copy(op)
            continue
        number = next(numbers[op.kind])
        operands = [*map(out.new, op.operands), slots, starts]
        if op.kind == "gated_delta_net":
            operands += delta_states(out, op, number)
        else:
            operands += cache_states(out, op, number)
        attrs = {**op.attrs.to_dict(), "rows": "sequence"}
        out.replace(op.result, out.emit(f"stateful_{op.kind}", *operands, **attrs))
    return out.done()


def delta_states(out: Rewriter, op: Op, number: int) -> list[Value]:
    channels, _, taps = op["conv_w"].type.shape
    (value_dim,) = op["norm_w"].type.shape
    key_heads, value_heads = op.attrs["key_heads"], op.attrs["value_heads"]
    key_dim = (channels - value_heads * value_dim) // (2 * key_heads)
    conv = TensorType("f32", (SEQUENCES, static(taps) - 1, channels))
    delta = TensorType("f32", (SEQUENCES, value_heads, key_dim, value_dim))
    return [
        out.state(f"delta_net.{number}.conv", conv),
        out.state(f"delta_net.{number}.delta", delta),
    ]


def cache_states(out: Rewriter, op: Op, number: int) -> list[Value]:
    (head_dim,) = op["q_norm"].type.shape
    cache = TensorType("f32", (SEQUENCES, CONTEXT, op.attrs["kv_heads"], head_dim))
    return [out.state(f"attention.{number}.{name}", cache) for name in ("keys", "values")]
