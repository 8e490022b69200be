"""Fuse the interpolation between rows of a table."""

from __future__ import annotations

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.passes.match import Matcher, is_weight


def fuse_interpolation(graph: Graph) -> Graph:
    """Replace the weighted sum of looked up rows by interpolate_rows.

    Before:
        graph g fused {
          input %taps: i32[4*T, 4]
          input %weights: f32[4*T, 4]
          weight @table: f32[9, 8]
          %0: f32[4*T, 4, 8] = embedding(%taps, @table)
          %1: f32[4*T, 4, 1] = reshape(%weights) {shape = (4*T, 4, 1)}
          %2: f32[4*T, 4, 8] = mul(%0, %1)
          %3: f32[4*T, 1, 8] = sum(%2) {axis = 1}
          %4: f32[4*T, 8] = reshape(%3) {shape = (4*T, 8)}
          return %4
        }
    After:
        graph g fused {
          input %taps: i32[4*T, 4]
          input %weights: f32[4*T, 4]
          weight @table: f32[9, 8]
          %0: f32[4*T, 8] = interpolate_rows(@table, %taps, %weights)
          return %0
        }

    Left alone: a sum over another axis, weights for each value of a row, a table that is computed.
    """
    find, out = Matcher(graph), Rewriter(graph)
    for op in graph.ops:
        match = match_interpolation(find, op)
        if match is None:
            out.copy(op)
        else:
            out.replace(op.result, out.emit("interpolate_rows", *map(out.new, match)))
    return out.done()


def match_interpolation(find: Matcher, op: Op) -> tuple[Value, Value, Value] | None:
    """Match the view [T, H] of the sum over n of table[taps] [T, n, H] * weights [T, n, 1]; return table, taps, weights."""
    if op.kind != "reshape":
        return None
    total = find.op(op.source, "sum", axis=1)
    for rows, factor in find.either(total.source if total else None, "mul"):
        looked_up, weights = find.op(rows, "embedding"), find.through(factor, "reshape")
        if looked_up is None or not is_weight(looked_up["table"]):
            continue
        taps, table = looked_up.operands
        is_whole = op.result.type.shape == (*taps.type.shape[:1], table.type.shape[1])
        is_each = weights.type.shape == taps.type.shape
        if (
            taps.type.rank == 2
            and is_whole
            and is_each
            and factor.type.shape == (*taps.type.shape, 1)
        ):
            return table, taps, weights
    return None
