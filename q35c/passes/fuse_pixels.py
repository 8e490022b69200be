"""Fuse what turns the bytes of a picture into numbers."""

from __future__ import annotations

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.passes.match import Matcher


def fuse_pixels(graph: Graph) -> Graph:
    """Replace scale * x + shift of bytes by scale_pixels.

    Before:
        graph g fused {
          input %x: u8[4*T, 6]
          weight @w: f32[8, 6]
          %0: f32[4*T, 6] = cast(%x) {dtype = "f32"}
          %1: f32[4*T, 6] = mul_scalar(%0) {value = 0.5}
          %2: f32[4*T, 6] = add_scalar(%1) {value = -1.0}
          %3: f32[4*T, 8] = linear(%2, @w)
          return %3
        }
    After:
        graph g fused {
          input %x: u8[4*T, 6]
          weight @w: f32[8, 6]
          %0: f32[4*T, 6] = scale_pixels(%x) {scale = 0.5, shift = -1.0}
          %1: f32[4*T, 8] = linear(%0, @w)
          return %1
        }

    Left alone: what does not come from bytes in rows, a shift without a scale.
    """
    find, out = Matcher(graph), Rewriter(graph)
    for op in graph.ops:
        match = match_pixels(find, op)
        if match is None:
            out.copy(op)
            continue
        x, scale, shift = match
        out.replace(op.result, out.emit("scale_pixels", out.new(x), scale=scale, shift=shift))
    return out.done()


def match_pixels(find: Matcher, op: Op) -> tuple[Value, float, float] | None:
    """Match cast(x) * scale + shift of bytes x [T, K]."""
    if op.kind != "add_scalar":
        return None
    scaled = find.op(op.source, "mul_scalar")
    x = find.source(scaled.source if scaled else None, "cast", dtype="f32")
    if scaled is None or x is None or x.type.dtype != "u8" or x.type.rank != 2:
        return None
    return x, float(scaled.attrs["value"]), float(op.attrs["value"])
