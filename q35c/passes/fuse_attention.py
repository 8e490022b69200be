"""Fuse gated attention between its input and output projections."""

from __future__ import annotations

from q35c.ir.graph import Graph, Op, Rewriter, Value
from q35c.passes.match import Matcher


def fuse_attention(graph: Graph) -> Graph:
    """Replace the q/gate split, q and k norms, rotary, attention and sigmoid gate by gated_attention.

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
        out.replace(op.result, out.emit("gated_attention", *map(out.new, operands), **attrs))
    return out.done()


def match_attention(find: Matcher, op: Op) -> tuple[list[Value], dict] | None:
    """Match attention(q, k, v) * sigmoid(gate)."""
    if op.kind != "mul":
        return None
    for attended, activated in find.either(op.result, "mul"):
        attention = find.op(find.through(attended, "reshape"), "attention")
        gate = find.source(activated, "sigmoid")
        if attention is None or gate is None:
            continue
        q, k = (match_head(find, x) for x in attention.operands[:2])
        if q is None or k is None:
            return None
        q_source, q_norm, table, eps = q
        k_source, k_norm, k_table, k_eps = k
        q_gate = match_query(find, q_source, gate)
        v_source = find.source(attention.operands[2], "transpose", perm=(1, 0, 2))
        if q_gate is None or v_source is None or (table, eps) != (k_table, k_eps):
            return None
        k_flat, v_flat = (find.through(x, "reshape") for x in (k_source, v_source))
        heads, kv_heads = (x.type.shape[0] for x in attention.operands[:2])
        attrs = {"heads": heads, "kv_heads": kv_heads, "eps": eps, "scale": attention.attrs["scale"]}
        return [q_gate, k_flat, v_flat, q_norm, k_norm, table], attrs
    return None


def match_head(find: Matcher, value: Value) -> tuple[Value, Value, Value, float] | None:
    """Match rotary(transpose(rms_norm(x, w))); return x [T, H, D], w, table, eps."""
    rotary = find.op(value, "rotary")
    turned = find.source(rotary.operands[0], "transpose", perm=(1, 0, 2)) if rotary else None
    norm = find.op(turned, "rms_norm", offset=1.0)
    if rotary is None or norm is None:
        return None
    return norm.operands[0], norm.operands[1], rotary.operands[1], norm.attrs["eps"]


def match_query(find: Matcher, query: Value, gate: Value) -> Value | None:
    """Match query and gate as the halves of each head of one projection [T, Hq * 2 * D]."""
    first = find.last_axis_slice(find.through(query, "reshape"))
    second = find.last_axis_slice(find.through(gate, "reshape"))
    if first is None or second is None or first[0] != second[0]:
        return None
    heads, width = first[0], query.type.shape[-1]
    if first[1:] != (0, width) or second[1:] != (width, 2 * width) or heads.type.rank != 3:
        return None
    return find.through(heads, "reshape")
