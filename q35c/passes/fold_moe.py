"""Fold routing, experts and the shared expert into one sparse op."""

from __future__ import annotations

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.passes.match import Matcher


def fold_moe(graph: Graph) -> Graph:
    """Replace softmax, top-k, renormalisation, experts and gated shared expert by sparse_moe.

    Before:
        graph g fused {
          input %x: f32[T, 4]
          input %logits: f32[T, 5]
          input %shared: f32[T, 4]
          input %gate: f32[T, 1]
          weight @gate_up: f32[5, 6, 4]
          weight @down: f32[5, 4, 3]
          %0: f32[T, 5] = softmax(%logits) {axis = -1}
          %1: f32[T, 2], %2: i32[T, 2] = topk(%0) {k = 2}
          %3: f32[T, 1] = sum(%1) {axis = -1}
          %4: f32[T, 2] = div(%1, %3)
          %5: f32[T, 4] = experts(%x, %2, %4, @gate_up, @down)
          %6: f32[T, 1] = sigmoid(%gate)
          %7: f32[T, 4] = mul(%6, %shared)
          %8: f32[T, 4] = add(%5, %7)
          return %8
        }
    After:
        graph g fused {
          input %x: f32[T, 4]
          input %logits: f32[T, 5]
          input %shared: f32[T, 4]
          input %gate: f32[T, 1]
          weight @gate_up: f32[5, 6, 4]
          weight @down: f32[5, 4, 3]
          %0: f32[T, 4] = sparse_moe(%x, %logits, %shared, %gate, @gate_up, @down) {top_k = 2}
          return %0
        }

    Left alone: weights that are not renormalised by the sum of the chosen ones, a softmax over the
    chosen ones only, ids that come from another top-k, a shared expert without its sigmoid gate.
    """
    find, out = Matcher(graph), Rewriter(graph)
    for op in graph.ops:
        match = match_moe(find, op)
        if match is None:
            out.copy(op)
            continue
        operands, top_k = match
        out.replace(op.result, out.emit("sparse_moe", *map(out.new, operands), top_k=top_k))
    return out.done()


def match_moe(find: Matcher, op: Op) -> tuple[list[Value], int] | None:
    """Match experts(x, ids, weights) + sigmoid(gate) * shared."""
    if op.kind != "add":
        return None
    for routed, gated in find.either(op.result, "add"):
        experts = find.op(find.through(routed, "reshape"), "experts")
        if experts is None or experts.result.type != op.result.type:
            continue
        x, ids, weights, gate_up, down = experts.operands
        routing = match_routing(find, ids, weights)
        shared = match_shared(find, gated, x)
        if routing and shared and routing[0].type.shape[-1] == gate_up.type.shape[0]:
            logits, top_k = routing
            return [x, logits, *shared, gate_up, down], top_k
    return None


def match_routing(find: Matcher, ids: Value, weights: Value) -> tuple[Value, int] | None:
    """Match weights = chosen / sum(chosen), (chosen, ids) = topk(softmax(logits))."""
    division = find.op(weights, "div")
    chosen = division["a"] if division else None
    top = find.op(chosen, "topk")
    if division is None or top is None or top.results != (chosen, ids):
        return None
    if find.over_last_axis(division["b"], "sum") != chosen:
        return None
    logits = find.over_last_axis(top["x"], "softmax")
    return (logits, top.attrs["k"]) if logits is not None else None


def match_shared(find: Matcher, gated: Value, x: Value) -> tuple[Value, Value] | None:
    """Match sigmoid(gate) * shared with one gate logit per token; return shared and gate."""
    for activated, shared in find.either(gated, "mul"):
        gate = find.source(activated, "sigmoid")
        if gate is not None and gate.type.shape == (x.type.shape[0], 1) and shared.type == x.type:
            return shared, gate
    return None
