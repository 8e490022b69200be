"""Introduce conv, delta and key/value state: the traced graph has none."""

from __future__ import annotations

from q35c.ir.graph import Graph, Op, Rewriter, Value
from q35c.ir.types import SymDim, TensorType

SEQUENCES, CONTEXT = SymDim("B"), SymDim("CTX")


def thread_state(graph: Graph) -> Graph:
    """Let each mixer continue the sequence named by `slots`, which holds `starts` tokens already.

    Before:  %y = gated_attention(%q, %k, %v, @qn, @kn, %table)
    After:   %y = stateful_gated_attention(%q, %k, %v, @qn, @kn, %table, %slots, %starts,
                                           $attention.0.keys, $attention.0.values)
    with new inputs `slots: i64[1]` and `starts: i32[1]`; gated_delta_net likewise gets its conv state
    [B, K-1, C] and its recurrent state [B, Hv, Dk, Dv].
    """
    out = Rewriter(graph, stage="stateful")
    slots = out.input("slots", TensorType("i64", (1,)))
    starts = out.input("starts", TensorType("i32", (1,)))
    counts = {"gated_delta_net": 0, "gated_attention": 0}
    for op in graph.ops:
        if op.kind not in counts:
            out.copy(op)
            continue
        number = counts[op.kind]
        counts[op.kind] += 1
        operands = [*map(out.new, op.operands), slots]
        if op.kind == "gated_delta_net":
            operands += delta_states(out, op, number)
        else:
            operands += [starts, *cache_states(out, op, number)]
        attrs = {**op.attrs.to_dict(), "rows": "sequence"}
        out.replace(op.result, out.emit(f"stateful_{op.kind}", *operands, **attrs))
    return out.done()


def delta_states(out: Rewriter, op: Op, number: int) -> list[Value]:
    channels, _, taps = op.operands[4].type.shape
    (value_dim,) = op.operands[7].type.shape
    key_heads, value_heads = op.attrs["key_heads"], op.attrs["value_heads"]
    key_dim = (channels - value_heads * value_dim) // (2 * key_heads)
    conv = TensorType("f32", (SEQUENCES, taps - 1, channels))
    delta = TensorType("f32", (SEQUENCES, value_heads, key_dim, value_dim))
    return [out.state(f"delta_net.{number}.conv", conv), out.state(f"delta_net.{number}.delta", delta)]


def cache_states(out: Rewriter, op: Op, number: int) -> list[Value]:
    (head_dim,) = op.operands[3].type.shape
    cache = TensorType("f32", (SEQUENCES, CONTEXT, op.attrs["kv_heads"], head_dim))
    return [out.state(f"attention.{number}.{name}", cache) for name in ("keys", "values")]
