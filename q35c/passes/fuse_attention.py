"""Fuse gated attention between its input and output projections."""

from __future__ import annotations

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.ir.types import static
from q35c.passes.match import Matcher


def fuse_attention(graph: Graph) -> Graph:
    """Replace the q/gate split, q and k norms, rotary, attention and sigmoid gate by gated_attention.

    Before:
        graph g fused {
          input %q_gate: f32[T, 16]
          input %k: f32[T, 4]
          input %v: f32[T, 4]
          input %table: f32[T, 2]
          weight @q_norm: f32[4]
          weight @k_norm: f32[4]
          %0: f32[T, 2, 8] = reshape(%q_gate) {shape = (T, 2, 8)}
          %1: f32[T, 2, 4] = slice(%0) {axis = -1, start = 0, step = 1, stop = 4}
          %2: f32[T, 2, 4] = slice(%0) {axis = -1, start = 4, step = 1, stop = 8}
          %3: f32[T, 8] = reshape(%2) {shape = (T, 8)}
          %4: f32[T, 2, 4] = rms_norm(%1, @q_norm) {eps = 1e-06, offset = 1.0}
          %5: f32[2, T, 4] = transpose(%4) {perm = (1, 0, 2)}
          %6: f32[2, T, 4] = rotary(%5, %table)
          %7: f32[T, 1, 4] = reshape(%k) {shape = (T, 1, 4)}
          %8: f32[T, 1, 4] = rms_norm(%7, @k_norm) {eps = 1e-06, offset = 1.0}
          %9: f32[1, T, 4] = transpose(%8) {perm = (1, 0, 2)}
          %10: f32[1, T, 4] = rotary(%9, %table)
          %11: f32[T, 1, 4] = reshape(%v) {shape = (T, 1, 4)}
          %12: f32[1, T, 4] = transpose(%11) {perm = (1, 0, 2)}
          %13: f32[T, 2, 4] = attention(%6, %10, %12) {scale = 0.5}
          %14: f32[T, 8] = reshape(%13) {shape = (T, 8)}
          %15: f32[T, 8] = sigmoid(%3)
          %16: f32[T, 8] = mul(%14, %15)
          return %16
        }
    After:
        graph g fused {
          input %q_gate: f32[T, 16]
          input %k: f32[T, 4]
          input %v: f32[T, 4]
          input %table: f32[T, 2]
          weight @q_norm: f32[4]
          weight @k_norm: f32[4]
          %0: f32[T, 8] = gated_attention(%q_gate, %k, %v, @q_norm, @k_norm, %table)
              {eps = 1e-06, heads = 2, kv_heads = 1, scale = 0.5}
          %1: f32[T, 8] = reshape(%0) {shape = (T, 8)}
          return %1
        }

    Left alone: a gate that is not the second half of each query head, norms with different eps, a
    rotation of q and k by different tables.
    """
    find, out = Matcher(graph), Rewriter(graph)
    for op in graph.ops:
        match = match_attention(find, op)
        if match is None:
            out.copy(op)
            continue
        operands, attrs = match
        fused = out.emit("gated_attention", *map(out.new, operands), **attrs)
        out.replace(op.result, out.emit("reshape", fused, shape=op.result.type.shape))
    return out.done()


def match_attention(find: Matcher, op: Op) -> tuple[list[Value], dict] | None:
    """Match attention(q, k, v) * sigmoid(gate)."""
    if op.kind != "mul":
        return None
    for attended, activated in find.either(op.result, "mul"):
        attention = find.op(find.through(attended, "reshape"), "attention")
        gate = find.source(activated, "sigmoid")
        if attention is None or gate is None or attended.type != activated.type:
            continue
        q, k = (match_head(find, attention[name]) for name in ("q", "k"))
        if q is None or k is None:
            return None
        q_source, q_norm, table, eps = q
        k_source, k_norm, k_table, k_eps = k
        q_gate = match_query(find, q_source, gate)
        k_flat = match_rows(find, k_source)
        v_flat = match_rows(find, find.source(attention["v"], "transpose", perm=(1, 0, 2)))
        if q_gate is None or k_flat is None or v_flat is None or (table, eps) != (k_table, k_eps):
            return None
        heads, kv_heads = (attention[name].type.shape[0] for name in ("q", "k"))
        attrs = {
            "heads": heads, "kv_heads": kv_heads, "eps": eps, "scale": attention.attrs["scale"],
        }  # fmt: skip
        return [q_gate, k_flat, v_flat, q_norm, k_norm, table], attrs
    return None


def match_head(find: Matcher, value: Value) -> tuple[Value, Value, Value, float] | None:
    """Match rotary(transpose(rms_norm(x, w))); return x [T, H, D], w, table, eps."""
    rotary = find.op(value, "rotary")
    turned = find.source(rotary["x"], "transpose", perm=(1, 0, 2)) if rotary else None
    norm = find.op(turned, "rms_norm", offset=1.0)
    if rotary is None or norm is None:
        return None
    return norm["x"], norm["weight"], rotary["table"], norm.attrs["eps"]


def match_query(find: Matcher, query: Value, gate: Value) -> Value | None:
    """Match query and gate as the halves of each head of one projection [T, Hq * 2 * D]."""
    first = find.last_axis_slice(find.through(query, "reshape"))
    second = find.last_axis_slice(find.through(gate, "reshape"))
    if first is None or second is None or first[0] != second[0]:
        return None
    heads, (tokens, count, width) = first[0], query.type.shape
    if first[1:] != (0, width) or second[1:] != (width, 2 * width):
        return None
    return match_rows(find, heads) if heads.type.shape == (tokens, count, 2 * width) else None


def match_rows(find: Matcher, heads: Value | None) -> Value | None:
    """Match a view [T, H, D] of rows [T, H * D]; return the rows."""
    if heads is None:
        return None
    tokens, count, width = heads.type.shape
    rows = find.through(heads, "reshape")
    return rows if rows.type.shape == (tokens, static(count) * static(width)) else None
