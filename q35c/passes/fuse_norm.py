"""Fuse RMS norms, plain and gated."""

from __future__ import annotations

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.passes.match import Matcher, is_weight


def fuse_norm(graph: Graph) -> Graph:
    """Replace x * rsqrt(mean(x^2) + eps) * (offset + w) by rms_norm, and with * silu(g) by its gated form.

    Before:
        graph g fused {
          input %x: f32[T, 8]
          weight @w: f32[8]
          %0: f32[T, 8] = pow_scalar(%x) {exponent = 2}
          %1: f32[T, 1] = mean(%0) {axis = -1}
          %2: f32[T, 1] = add_scalar(%1) {value = 1e-06}
          %3: f32[T, 1] = rsqrt(%2)
          %4: f32[T, 8] = mul(%x, %3)
          %5: f32[8] = add_scalar(@w) {value = 1.0}
          %6: f32[T, 8] = mul(%4, %5)
          return %6
        }
    After:
        graph g fused {
          input %x: f32[T, 8]
          weight @w: f32[8]
          %0: f32[T, 8] = rms_norm(%x, @w) {eps = 1e-06, offset = 1.0}
          return %0
        }

    Left alone: another exponent or axis, a mean of another value, a scale that is no weight.
    """
    find, out = Matcher(graph), Rewriter(graph)
    plain: dict[Value, tuple[Value, Value, float]] = {}  # norms without offset, by old result
    for op in graph.ops:
        if gated := match_gated(find, plain, op):
            (x, weight, eps), gate = gated
            fused = out.emit("gated_rms_norm", out.new(x), weight, out.new(gate), eps=eps)
            out.replace(op.result, fused)
        elif norm := match_norm(find, op):
            x, weight, eps, offset = norm
            fused = out.emit("rms_norm", out.new(x), weight, eps=eps, offset=offset)
            out.replace(op.result, fused)
            if offset == 0.0:
                plain[op.result] = x, weight, eps
        else:
            out.copy(op)
    return out.done()


def match_norm(find: Matcher, op: Op) -> tuple[Value, Value, float, float] | None:
    """Match the outer multiplication; return x, weight, eps, offset."""
    if op.kind != "mul":
        return None
    for scaled, factor in find.either(op.result, "mul"):
        offset_op = find.op(factor, "add_scalar")
        weight = offset_op["x"] if offset_op else factor
        if not is_weight(weight) or weight.type.shape != op.result.type.shape[-1:]:
            continue
        for x, scale in find.either(scaled, "mul"):
            eps = match_inverse_rms(find, x, scale)
            if eps is not None and x.type == op.result.type:
                return x, weight, eps, float(offset_op.attrs["value"]) if offset_op else 0.0
    return None


def match_inverse_rms(find: Matcher, x: Value, scale: Value) -> float | None:
    """Match scale = rsqrt(mean(x^2, last axis) + eps); return eps."""
    shifted = find.op(find.source(scale, "rsqrt"), "add_scalar")
    squared = find.over_last_axis(shifted["x"], "mean") if shifted else None
    if find.source(squared, "pow_scalar", exponent=2) != x:
        return None
    return float(shifted.attrs["value"])  # type: ignore[union-attr]


def match_gated(
    find: Matcher, plain: dict[Value, tuple[Value, Value, float]], op: Op
) -> tuple[tuple[Value, Value, float], Value] | None:
    """Match norm(x, w) * silu(gate) where the norm has no offset; return the norm and the gate."""
    if op.kind != "mul":
        return None
    for normed, activated in find.either(op.result, "mul"):
        gate = find.source(activated, "silu")
        if normed in plain and gate is not None and gate.type == op.result.type:
            return plain[normed], gate
    return None
