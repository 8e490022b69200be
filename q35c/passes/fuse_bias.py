"""Move a linear's bias, and what follows it, into its epilogue."""

from __future__ import annotations

from typing import Any

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.passes.match import Matcher, is_weight

Match = tuple[str, tuple[Value, ...], dict[str, Any]]


def fuse_bias(graph: Graph) -> Graph:
    """Fuse linears with their bias, and with the GELU or the residual addition behind it.

    Before:
        graph g fused {
          input %x: f32[T, 8]
          weight @up: f32[16, 8]
          weight @up_bias: f32[16]
          weight @down: f32[8, 16]
          weight @down_bias: f32[8]
          %0: f32[T, 16] = linear(%x, @up)
          %1: f32[T, 16] = add(%0, @up_bias)
          %2: f32[T, 16] = gelu(%1) {form = "tanh"}
          %3: f32[T, 8] = linear(%2, @down)
          %4: f32[T, 8] = add(%3, @down_bias)
          %5: f32[T, 8] = add(%x, %4)
          return %5
        }
    After:
        graph g fused {
          input %x: f32[T, 8]
          weight @up: f32[16, 8]
          weight @up_bias: f32[16]
          weight @down: f32[8, 16]
          weight @down_bias: f32[8]
          %0: f32[T, 16] = linear_bias_gelu(%x, @up, @up_bias) {form = "tanh"}
          %1: f32[T, 8] = linear_bias_residual(%0, %x, @down, @down_bias)
          return %1
        }

    Left alone: a product or sum that is read elsewhere too, a bias that is no weight or not one for each column.
    """
    find, out = Matcher(graph), Rewriter(graph)
    for op in graph.ops:
        match = match_gelu(find, op) or match_sum(find, op)
        if match is None:
            out.copy(op)
            continue
        kind, operands, attrs = match
        out.replace(op.result, out.emit(kind, *map(out.new, operands), **attrs))
    return out.done()


def match_sum(find: Matcher, op: Op) -> Match | None:
    """Match a sum of a linear and its bias, or of those two and a residual."""
    if op.kind != "add":
        return None
    return match_residual(find, op) or match_bias(find, op.result)


def match_bias(find: Matcher, value: Value) -> Match | None:
    """Match linear(x, weight) + bias."""
    for product, bias in find.either(value, "add"):
        linear = find.op(product, "linear")
        if linear is None or len(linear.operands) != 2 or find.uses[product] != 1:
            continue
        if is_weight(bias) and bias.type.shape == linear["weight"].type.shape[:1]:
            return "linear_bias", (*linear.operands, bias), {}
    return None


def match_gelu(find: Matcher, op: Op) -> Match | None:
    """Match gelu(linear(x, weight) + bias)."""
    biased = (
        match_bias(find, op.source) if op.kind == "gelu" and find.uses[op.source] == 1 else None
    )
    return biased and ("linear_bias_gelu", biased[1], op.attrs.to_dict())


def match_residual(find: Matcher, op: Op) -> Match | None:
    """Match residual + (linear(x, weight) + bias)."""
    for residual, value in find.either(op.result, "add"):
        biased = match_bias(find, value) if find.uses[value] == 1 else None
        if biased is not None and residual.type == value.type:
            x, *others = biased[1]
            return "linear_bias_residual", (x, residual, *others), {}
    return None
