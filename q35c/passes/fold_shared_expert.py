"""Let shared experts that look like the routed ones be one of them."""

from __future__ import annotations

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.passes.match import Matcher

MOE_KINDS = ("sparse_moe_residual", "quantized_moe_residual")


def fold_shared_expert(graph: Graph) -> Graph:
    """Give a mixture the weights of its shared expert, where these have the routed ones' sizes, formats and input.

    Before:
        graph g scheduled {
          input %x: f32[T, 6]
          input %logits: f32[T, 3]
          input %sigma: f32[T, 1]
          input %r: f32[T, 6]
          weight @gate: f32[4, 6]
          weight @up: f32[4, 6]
          weight @down: f32[6, 4]
          weight @experts_in: f32[3, 8, 6]
          weight @experts_out: f32[3, 6, 4]
          %0: f32[T, 4] = linear_swiglu(%x, @gate, @up)
          %1: f32[T, 6] = linear(%0, @down)
          %2: f32[T, 6] = sparse_moe_residual(%x, %logits, %1, %sigma, @experts_in, @experts_out, %r) {top_k = 2}
          return %2
        }
    After:
        graph g scheduled {
          input %x: f32[T, 6]
          input %logits: f32[T, 3]
          input %sigma: f32[T, 1]
          input %r: f32[T, 6]
          weight @experts_in: f32[3, 8, 6]
          weight @experts_out: f32[3, 6, 4]
          weight @gate: f32[4, 6]
          weight @up: f32[4, 6]
          weight @down: f32[6, 4]
          %0: f32[T, 6] = folded_moe_residual(%x, %logits, %sigma, @experts_in, @experts_out, %r, @gate, @up, @down)
              {dtype = "f32", top_k = 2}
          return %0
        }

    Left alone: shared experts of other sizes, formats or input, and those whose inner values have other readers.
    """
    find, out = Matcher(graph), Rewriter(graph)
    for op in graph.ops:
        expert = match_shared_expert(find, op)
        if expert is None:
            out.copy(op)
            continue
        names = ("x", "router_logits", "shared_gate", "gate_up", "down", "residual")
        operands = [*(out.new(op[name]) for name in names), *expert]
        attrs = {"top_k": op.attrs["top_k"], "dtype": op.attrs.get("dtype", "f32")}
        out.replace(op.result, out.emit("folded_moe_residual", *operands, **attrs))
    return out.done()


def match_shared_expert(find: Matcher, op: Op) -> tuple[Value, Value, Value] | None:
    """Match shared = linear(rounded(linear_swiglu(x, gate, up)), down) of a mixture's own x; return gate, up, down."""
    last = find.op(op["shared"], "linear") if op.kind in MOE_KINDS else None
    if last is None or len(last.operands) != 2:
        return None
    rounding = find.op(last["x"], "quantize_rows")
    swiglu = find.op(rounding["x"] if rounding else last["x"], "linear_swiglu")
    if swiglu is None or swiglu["x"] != op["x"]:
        return None
    inner = [made.result for made in (swiglu, rounding, last) if made is not None]
    if any(find.uses[value] != 1 for value in inner):
        return None
    gate, up, down = swiglu["gate"], swiglu["up"], last["weight"]
    _, double, hidden = op["gate_up"].type.shape
    has_size = (double, hidden) == (2 * gate.type.shape[0], gate.type.shape[1])  # type: ignore[operator]
    formats = (gate.type.dtype, down.type.dtype) == (
        op["gate_up"].type.dtype,
        op["down"].type.dtype,
    )
    return (gate, up, down) if has_size and formats else None
