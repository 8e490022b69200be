"""Drop what changes nothing, so that later passes see one form of each computation."""

from __future__ import annotations

from q35c.ir.graph import Graph, Op, Rewriter, Value
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
        operands = tuple(map(out.new, op.operands))
        simpler = simplify(op, operands, made, out)
        if simpler is not None:
            out.replace(op.result, simpler)
            continue
        key = (op.kind, operands, op.attrs)
        if key in seen and not OPS[op.kind].writes_state:
            for old, new in zip(op.results, seen[key], strict=True):
                out.replace(old, new)
            continue
        results = seen[key] = out.copy(op)
        made[results[0]] = Op(op.kind, operands, op.attrs, results)
    return out.done()


def simplify(op: Op, operands: tuple[Value, ...], made: dict[Value, Op], out: Rewriter) -> Value | None:
    """Return an equal value that is already there or one view away, or None."""
    rule = RULES.get(op.kind)
    return rule(op, operands[0], made.get(operands[0]), out) if rule else None


def fold_cast(op: Op, x: Value, source: Op | None, out: Rewriter) -> Value | None:
    """cast(x: t, t) -> x"""
    return x if op.result.type == x.type else None


def fold_reshape(op: Op, x: Value, source: Op | None, out: Rewriter) -> Value | None:
    """reshape(x, shape of x) -> x; reshape(reshape(x)) -> reshape(x)"""
    while source is not None and source.kind == "reshape":
        x, source = source.operands[0], None
    if x.type == op.result.type:
        return x
    return None if x == out.new(op.operands[0]) else out.emit("reshape", x, shape=op.attrs["shape"])


def fold_transpose(op: Op, x: Value, source: Op | None, out: Rewriter) -> Value | None:
    """transpose(x, 0 1 2) -> x; transpose(transpose(x, p), q) -> transpose(x, p[q])"""
    perm = op.attrs["perm"]
    if source is not None and source.kind == "transpose":
        x, perm = source.operands[0], tuple(source.attrs["perm"][i] for i in perm)
    if perm == tuple(range(len(perm))):
        return x
    return None if x == out.new(op.operands[0]) else out.emit("transpose", x, perm=perm)


def fold_slice(op: Op, x: Value, source: Op | None, out: Rewriter) -> Value | None:
    """slice(x, all of it) -> x"""
    return x if op.result.type == x.type else None


def fold_neutral(neutral: float):
    """x * 1 -> x; x + 0 -> x"""
    return lambda op, x, source, out: x if op.attrs["value"] == neutral else None


RULES = {
    "cast": fold_cast,
    "reshape": fold_reshape,
    "transpose": fold_transpose,
    "slice": fold_slice,
    "mul_scalar": fold_neutral(1.0),
    "add_scalar": fold_neutral(0.0),
}
