"""Merge linears that read one input and move elementwise work into their epilogues."""

from __future__ import annotations

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.ir.types import static
from q35c.passes.match import Matcher

# Operands of a consumer whose linears become one. Projections that tolerate few bits stay apart
# from the sensitive gates (b, a, router), so that each merged weight has one precision.
MERGED_OPERANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gated_delta_net": (("qkv", "z"), ("b", "a")),
    "gated_attention": (("q_gate", "k", "v"),),
    "sparse_moe": (("router_logits", "shared_gate"),),
}


def fuse_linear(graph: Graph) -> Graph:
    """Merge sibling linears, fuse silu(gate) * up and residual additions.

    Before:
        graph g fused {
          input %x: f32[T, 8]
          weight @gate: f32[16, 8]
          weight @up: f32[16, 8]
          weight @down: f32[8, 16]
          %0: f32[T, 16] = linear(%x, @gate)
          %1: f32[T, 16] = silu(%0)
          %2: f32[T, 16] = linear(%x, @up)
          %3: f32[T, 16] = mul(%1, %2)
          %4: f32[T, 8] = linear(%3, @down)
          %5: f32[T, 8] = add(%x, %4)
          return %5
        }
    After:
        graph g fused {
          input %x: f32[T, 8]
          weight @gate: f32[16, 8]
          weight @up: f32[16, 8]
          weight @down: f32[8, 16]
          %0: f32[T, 16] = linear_swiglu(%x, @gate, @up)
          %1: f32[T, 8] = linear_residual(%0, %x, @down)
          return %1
        }

    A merged linear keeps its weights as separate operands, so the slice of each stays known.
    Left alone: linears of different inputs, a product whose factor is read elsewhere.
    """
    find, out = Matcher(graph), Rewriter(graph)
    for op in graph.ops:
        if op.kind in MERGED_OPERANDS:
            merge_siblings(find, out, op)
            out.copy(op)
        elif swiglu := match_swiglu(find, op):
            x, gate, up = swiglu
            out.replace(op.result, out.emit("linear_swiglu", out.new(x), gate, up))
        elif (residual := match_residual(find, op)) is not None:
            kind, operands, attrs = residual
            out.replace(op.result, out.emit(kind, *map(out.new, operands), **attrs))
        else:
            out.copy(op)
    return out.done()


def merge_siblings(find: Matcher, out: Rewriter, op: Op) -> None:
    """Emit one linear for each group of operands and let the operands read slices of it."""
    for group in MERGED_OPERANDS[op.kind]:
        members = [op[name] for name in group]
        linears = [linear for member in members if (linear := find.op(member, "linear"))]
        sources = {linear["x"] for linear in linears}
        if len(linears) != len(members) or len(sources) != 1:
            continue
        (x,) = sources
        weights = [w for linear in linears for w in linear.playing("factors")]
        merged = out.emit("linear", out.new(x), *weights)
        start = 0
        for member in members:
            stop = start + static(member.type.shape[-1])
            part = out.emit("slice", merged, axis=-1, start=start, stop=stop, step=1)
            out.replace(member, part)
            start = stop


def match_swiglu(find: Matcher, op: Op) -> tuple[Value, Value, Value] | None:
    """Match silu(x gate^T) * (x up^T); return x, gate, up."""
    if op.kind != "mul":
        return None
    for activated, up_value in find.either(op.result, "mul"):
        gate = find.op(find.source(activated, "silu"), "linear")
        up = find.op(up_value, "linear")
        if gate is None or up is None or len(gate.operands) != 2 or len(up.operands) != 2:
            continue
        if any(find.uses[factor] != 1 for factor in (activated, gate.result, up_value)):
            continue
        same_shape = gate["weight"].type.shape == up["weight"].type.shape
        if gate["x"] == up["x"] and same_shape:
            return gate["x"], gate["weight"], up["weight"]
    return None


def match_residual(find: Matcher, op: Op) -> tuple[str, tuple[Value, ...], dict] | None:
    """Match residual + linear(x, w) and residual + sparse_moe(..), each read only here."""
    if op.kind != "add":
        return None
    for residual, value in find.either(op.result, "add"):
        if find.uses[value] != 1 or not residual.type == value.type == op.result.type:
            continue
        linear = find.op(value, "linear")
        if linear is not None and len(linear.operands) == 2:
            x, weight = linear.operands
            return "linear_residual", (x, residual, weight), {}
        moe = find.op(value, "sparse_moe")
        if moe is not None:
            return "sparse_moe_residual", (*moe.operands, residual), moe.attrs.to_dict()
    return None
