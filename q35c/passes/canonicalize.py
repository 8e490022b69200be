"""Drop what changes nothing, so that later passes see one form of each computation."""

from __future__ import annotations

from dataclasses import replace

from q35c.ir.build import Rewriter
from q35c.ir.graph import Attrs, Graph, Op, Value
from q35c.ir.ops import OPS


def canonicalize(graph: Graph) -> Graph:
    """Fold no-op casts and views, merge equal ops, drop dead code.

    Before:
        graph g traced {
          input %x: f32[T, 8]
          %0: f32[T, 8] = cast(%x) {dtype = "f32"}
          %1: f32[T, 2, 4] = reshape(%0) {shape = (T, 2, 4)}
          %2: f32[T, 8] = reshape(%1) {shape = (T, 8)}
          %3: f32[T, 8] = exp(%2)
          %4: f32[T, 8] = exp(%0)
          %5: f32[T, 8] = add(%3, %4)
          return %5
        }
    After:
        graph g traced {
          input %x: f32[T, 8]
          %0: f32[T, 8] = exp(%x)
          %1: f32[T, 8] = add(%0, %0)
          return %1
        }

    Ops that write state are never merged.
    """
    out = Rewriter(graph)
    seen: dict[tuple, tuple[Value, ...]] = {}
    made: dict[Value, Op] = {}
    for op in graph.ops:
        op = replace(op, operands=tuple(map(out.new, op.operands)))
        simpler = simplify(op, made)
        if isinstance(simpler, Value):
            out.replace(op.result, simpler)
            continue
        key = (simpler.kind, simpler.operands, simpler.attrs)
        if key not in seen or OPS[op.kind].writes_state:
            seen[key] = out.append(*key)
            made[seen[key][0]] = replace(simpler, results=seen[key])
        for old, new in zip(op.results, seen[key], strict=True):
            out.replace(old, new)
    return out.done()


def simplify(op: Op, made: dict[Value, Op]) -> Value | Op:
    """Return an equal value that is already there, or the op in its simplest form."""
    rule = RULES.get(op.kind)
    return rule(op, made.get(op.source)) if rule else op


def fold_cast(op: Op, source: Op | None) -> Value | Op:
    """cast(x: t, t) -> x"""
    (x,) = op.operands
    return x if op.result.type == x.type else op


def fold_reshape(op: Op, source: Op | None) -> Value | Op:
    """reshape(x, shape of x) -> x; reshape(reshape(x)) -> reshape(x)"""
    if source is not None and source.kind == "reshape":
        op = replace(op, operands=source.operands)
    (x,) = op.operands
    return x if op.result.type == x.type else op


def fold_transpose(op: Op, source: Op | None) -> Value | Op:
    """transpose(x, 0 1 2) -> x; transpose(transpose(x, p), q) -> transpose(x, p[q])"""
    perm = op.attrs["perm"]
    if source is not None and source.kind == "transpose":
        perm = tuple(source.attrs["perm"][i] for i in perm)
        op = replace(op, operands=source.operands, attrs=Attrs.of({"perm": perm}))
    return op.source if perm == tuple(range(len(perm))) else op


def fold_slice(op: Op, source: Op | None) -> Value | Op:
    """slice(x, all of it) -> x"""
    (x,) = op.operands
    return x if op.result.type == x.type else op


def fold_neutral(neutral: float):
    """x * 1 -> x; x + 0 -> x"""
    return lambda op, source: op.source if op.attrs["value"] == neutral else op


RULES = {
    "cast": fold_cast,
    "reshape": fold_reshape,
    "transpose": fold_transpose,
    "slice": fold_slice,
    "mul_scalar": fold_neutral(1.0),
    "add_scalar": fold_neutral(0.0),
}
