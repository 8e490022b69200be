"""Fuse the whole gated DeltaNet mixer between its input and output projections."""

from __future__ import annotations

from q35c.ir.graph import Graph, Op, Rewriter, Value
from q35c.passes.match import Matcher, is_weight


def fuse_gated_delta(graph: Graph) -> Graph:
    """Replace conv + SiLU + split + gates + delta rule + gated norm by gated_delta_net.

    Left alone: q, k and v that do not tile one convolution, gates of another form, a convolution
    without SiLU.
    """
    find, out = Matcher(graph), Rewriter(graph)
    for op in graph.ops:
        match = match_mixer(find, op)
        if match is None:
            out.copy(op)
            continue
        operands, attrs = match
        fused = out.emit("gated_delta_net", *map(out.new, operands), **attrs)
        out.replace(op.result, out.emit("reshape", fused, shape=op.result.type.shape))
    return out.done()


def match_mixer(find: Matcher, op: Op) -> tuple[list[Value], dict] | None:
    if op.kind != "gated_rms_norm":
        return None
    x, norm_w, gate = op.operands
    rule = find.op(find.through(x, "reshape"), "delta_rule")
    if rule is None:
        return None
    q, k, v, g, beta = rule.operands
    conv = match_convolution(find, q, k, v)
    decay = match_decay(find, g)
    b = find.source(beta, "sigmoid")
    if conv is None or decay is None or b is None:
        return None
    qkv, conv_w = conv
    a, a_log, dt_bias = decay
    tokens, value_heads, value_dim = v.type.shape
    z = find.through(gate, "reshape")
    if z.type.shape != (tokens, value_heads * value_dim):
        return None
    attrs = {"key_heads": q.type.shape[1], "value_heads": value_heads, "eps": op.attrs["eps"]}
    return [qkv, z, b, a, conv_w, a_log, dt_bias, norm_w], attrs


def match_convolution(find: Matcher, q: Value, k: Value, v: Value) -> tuple[Value, Value] | None:
    """Match q | k | v = split(transpose(silu(conv(transpose(qkv), w)))); return qkv and w [C, 1, K]."""
    parts = [find.last_axis_slice(find.through(x, "reshape")) for x in (q, k, v)]
    if any(part is None for part in parts):
        return None
    (mixed, start, q_end), (k_source, k_start, k_end), (v_source, v_start, end) = parts  # type: ignore[misc]
    if not (mixed == k_source == v_source and start == 0 and q_end == k_start and k_end == v_start):
        return None
    conv = find.op(find.source(find.source(mixed, "transpose"), "silu"), "causal_conv")
    if conv is None or end != mixed.type.shape[-1]:
        return None
    qkv = find.source(conv.operands[0], "transpose")
    weight = find.through(conv.operands[1], "reshape")
    return (qkv, weight) if qkv is not None and is_weight(weight) else None


def match_decay(find: Matcher, g: Value) -> tuple[Value, Value, Value] | None:
    """Match g = -exp(A_log) * softplus(a + dt_bias); return a, A_log, dt_bias."""
    for rate, step in find.either(g, "mul"):
        a_log = find.source(find.source(rate, "neg"), "exp")
        for a, dt_bias in find.either(find.source(step, "softplus"), "add"):
            if a_log is not None and is_weight(a_log) and is_weight(dt_bias):
                return a, a_log, dt_bias
    return None
