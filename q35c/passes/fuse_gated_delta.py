"""Fuse the whole gated DeltaNet mixer between its input and output projections."""

from __future__ import annotations

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.ir.types import static
from q35c.passes.match import Matcher, is_weight


def fuse_gated_delta(graph: Graph) -> Graph:
    """Replace conv + SiLU + split + gates + delta rule + gated norm by gated_delta_net.

    Before:
        graph g fused {
          input %qkv: f32[T, 10]
          input %z: f32[T, 4]
          input %b: f32[T, 2]
          input %a: f32[T, 2]
          weight @conv: f32[10, 1, 2]
          weight @A_log: f32[2]
          weight @dt_bias: f32[2]
          weight @w: f32[2]
          %0: f32[10, T] = transpose(%qkv) {perm = (1, 0)}
          %1: f32[10, 2] = reshape(@conv) {shape = (10, 2)}
          %2: f32[10, T] = causal_conv(%0, %1)
          %3: f32[10, T] = silu(%2)
          %4: f32[T, 10] = transpose(%3) {perm = (1, 0)}
          %5: f32[T, 3] = slice(%4) {axis = -1, start = 0, step = 1, stop = 3}
          %6: f32[T, 3] = slice(%4) {axis = -1, start = 3, step = 1, stop = 6}
          %7: f32[T, 4] = slice(%4) {axis = -1, start = 6, step = 1, stop = 10}
          %8: f32[T, 1, 3] = reshape(%5) {shape = (T, 1, 3)}
          %9: f32[T, 1, 3] = reshape(%6) {shape = (T, 1, 3)}
          %10: f32[T, 2, 2] = reshape(%7) {shape = (T, 2, 2)}
          %11: f32[2] = exp(@A_log)
          %12: f32[2] = neg(%11)
          %13: f32[T, 2] = add(%a, @dt_bias)
          %14: f32[T, 2] = softplus(%13)
          %15: f32[T, 2] = mul(%12, %14)
          %16: f32[T, 2] = sigmoid(%b)
          %17: f32[T, 2, 2] = delta_rule(%8, %9, %10, %15, %16)
          %18: f32[2*T, 2] = reshape(%17) {shape = (2*T, 2)}
          %19: f32[2*T, 2] = reshape(%z) {shape = (2*T, 2)}
          %20: f32[2*T, 2] = gated_rms_norm(%18, @w, %19) {eps = 1e-06}
          return %20
        }
    After:
        graph g fused {
          input %qkv: f32[T, 10]
          input %z: f32[T, 4]
          input %b: f32[T, 2]
          input %a: f32[T, 2]
          weight @conv: f32[10, 1, 2]
          weight @A_log: f32[2]
          weight @dt_bias: f32[2]
          weight @w: f32[2]
          %0: f32[T, 4] = gated_delta_net(%qkv, %z, %b, %a, @conv, @A_log, @dt_bias, @w)
              {eps = 1e-06, key_heads = 1, value_heads = 2}
          %1: f32[2*T, 2] = reshape(%0) {shape = (2*T, 2)}
          return %1
        }

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
    if z.type.shape != (tokens, static(value_heads) * static(value_dim)) or norm_w.type.shape != (
        value_dim,
    ):
        return None
    if qkv.type.shape[0] != tokens:
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
    turned = find.source(mixed, "transpose", perm=(1, 0))
    conv = find.op(find.source(turned, "silu"), "causal_conv")
    if conv is None or end != mixed.type.shape[-1]:
        return None
    qkv = find.source(conv["x"], "transpose", perm=(1, 0))
    weight = find.through(conv["weight"], "reshape")
    if qkv is None or not is_weight(weight) or weight.type.shape[:-1] != (end, 1):
        return None
    return qkv, weight


def match_decay(find: Matcher, g: Value) -> tuple[Value, Value, Value] | None:
    """Match g = -exp(A_log) * softplus(a + dt_bias); return a, A_log, dt_bias."""
    for rate, step in find.either(g, "mul"):
        a_log = find.source(find.source(rate, "neg"), "exp")
        if a_log is None or not is_head_weight(a_log, g):
            continue
        for a, dt_bias in find.either(find.source(step, "softplus"), "add"):
            if a.type == g.type and is_head_weight(dt_bias, g):
                return a, a_log, dt_bias
    return None


def is_head_weight(value: Value, gates: Value) -> bool:
    """Tell whether a value is a weight with one number per head of gates [T, Hv]."""
    return is_weight(value) and value.type.shape == gates.type.shape[-1:]
