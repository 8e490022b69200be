"""Fuse the interleaved multi-axis rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.ir.types import Shape, TensorType, static
from q35c.passes.match import Matcher, is_last_axis


@dataclass(frozen=True)
class Angles:
    """Where a cosine or sine table comes from."""

    positions: Value
    inv_freq: tuple[float, ...]
    sections: tuple[int, int, int]
    scaling: float


def fuse_rotary(graph: Graph) -> Graph:
    """Replace the table of cosines and sines by rotary_table and each rotated head by rotary.

    Before:  concat(a * cos + concat(-a[half:], a[:half]) * sin, x[R:]), a = x[:R], of x [H, T, D]
             cos = concat(m, m), m = cos(positions * inv_freq) * scaling of position axis 0, in which
             every third element is that of axis 1 or 2; sin likewise
    After:   rotary(x, rotary_table(positions))
    As IR text: tests/passes/fuse_rotary/one_head_group.txt

    The table is built once and shared by all layers. Left alone: a rotation whose halves come from
    different values, or whose cosine and sine belong to different angles.
    """
    find, out = Matcher(graph), Rewriter(graph)
    tables: dict[Angles, Value] = {}
    for op in graph.ops:
        match = match_rotary(find, op)
        if match is None:
            out.copy(op)
            continue
        x, angles = match
        if angles not in tables:
            tables[angles] = out.emit(
                "rotary_table", out.new(angles.positions), inv_freq=angles.inv_freq,
                sections=angles.sections, scaling=angles.scaling,
            )  # fmt: skip
        out.replace(op.result, out.emit("rotary", out.new(x), tables[angles]))
    return out.done()


def match_rotary(find: Matcher, op: Op) -> tuple[Value, Angles] | None:
    """Match concat(a*cos + turned(a)*sin, rest) where x [H, T, D] = [a | rest] along the last axis."""
    rotated, part = None, None
    if op.kind == "concat" and len(parts := find.joined(op.result)) == 2:
        rotated, part = parts[0], find.last_axis_slice(parts[1])
    if part is None:
        return None
    x, width, _ = part
    if x.type.rank != 3 or x.type != op.result.type:
        return None
    table = (x.type.shape[1], width)
    for direct, crossed in find.either(rotated, "add"):
        for a, cos in find.either(direct, "mul"):
            for turned, sin in find.either(crossed, "mul"):
                if find.last_axis_slice(a) != (x, 0, width) or not is_turned(find, turned, a):
                    continue
                angles = match_table(find, cos, "cos", table)
                if angles is not None and angles == match_table(find, sin, "sin", table):
                    return x, angles
    return None


def is_turned(find: Matcher, value: Value, a: Value) -> bool:
    """Match concat(-second half of a, first half of a)."""
    parts = find.joined(value)
    if len(parts) != 2:
        return False
    width = a.type.shape[-1]
    half = width // 2
    second = find.last_axis_slice(find.source(parts[0], "neg"))
    return second == (a, half, width) and find.last_axis_slice(parts[1]) == (a, 0, half)


def match_table(find: Matcher, value: Value, function: str, shape: Shape) -> Angles | None:
    """Match concat(m, m) [T, R] where m mixes the axes of function(positions * inv_freq) * scaling.

    One axis of 1 may stand before it: any other view would give cosines to other heads or tokens.
    """
    doubled = find.through(value, "reshape")
    parts = find.joined(doubled)
    if len(parts) != 2 or parts[0] != parts[1]:
        return None
    if doubled.type.shape != shape or value.type.shape not in (shape, (1, *shape)):
        return None
    mixed = match_mix(find, parts[0])
    if mixed is None:
        return None
    base, sections = mixed
    scaled = find.op(base, "mul_scalar")
    scaling = float(scaled.attrs["value"]) if scaled else 1.0
    product = find.source(scaled["x"] if scaled else base, function)
    for positions, frequencies in find.either(product, "mul"):
        constant = find.op(find.through(frequencies, "reshape"), "constant")
        source = find.through(positions, "reshape", "cast")
        if constant is None or source.type != TensorType("i32", (3, shape[0])):
            continue
        values = constant.attrs["values"]
        if positions.type.shape == (3, shape[0], 1) and base.type.shape[-1] == len(values):
            return Angles(source, values, sections, scaling)
    return None


def match_mix(find: Matcher, value: Value) -> tuple[Value, tuple[int, int, int]] | None:
    """Match axis 0 of a base [3, T, R/2], every third angle of it replaced by axis 1 and axis 2."""
    bases: list[Value | None] = []
    counts: list[int] = []
    for axis in (2, 1):
        update = find.op(value, "slice_update", start=axis, step=3)
        part = find.op(update["y"], "slice", start=axis, step=3) if update else None
        if update is None or part is None or not (is_last_axis(update) and is_last_axis(part)):
            return None
        bases.append(axis_of(find, part["x"], axis))
        counts.append(static(part.result.type.shape[-1]))
        value = update["x"]
    base = axis_of(find, value, 0)
    if base is None or bases != [base, base]:
        return None
    width, height = counts
    return base, (static(base.type.shape[-1]) - height - width, height, width)


def axis_of(find: Matcher, value: Value, axis: int) -> Value | None:
    """Match base[axis] of a base [3, T, R/2]; return the base."""
    cut = find.through(value, "reshape")
    base = find.source(cut, "slice", axis=0, start=axis, stop=axis + 1, step=1)
    return base if base is not None and base.type.shape == (3, *value.type.shape) else None
