"""Fuse the interleaved multi-axis rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass

from q35c.ir.graph import Graph, Op, Rewriter, Value
from q35c.passes.match import Matcher


@dataclass(frozen=True)
class Angles:
    """Where a cosine or sine table comes from."""

    positions: Value
    inv_freq: tuple[float, ...]
    sections: tuple[int, int, int]
    scaling: float


def fuse_rotary(graph: Graph) -> Graph:
    """Replace the table of cosines and sines by rotary_table and each rotated head by rotary.

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
    """Match concat(a*cos + turned(a)*sin, rest) where x = [a | rest] along the last axis."""
    if op.kind != "concat" or len(op.operands) != 2:
        return None
    rotated, rest = op.operands
    rest_part = find.last_axis_slice(rest)
    if rest_part is None or op.attrs["axis"] % op.result.type.rank != op.result.type.rank - 1:
        return None
    x, width, stop = rest_part
    if stop != x.type.shape[-1] or x.type != op.result.type:
        return None
    for direct, crossed in find.either(rotated, "add"):
        for a, cos in find.either(direct, "mul"):
            for turned, sin in find.either(crossed, "mul"):
                if find.last_axis_slice(a) != (x, 0, width) or not is_turned(find, turned, a):
                    continue
                angles = match_table(find, cos, "cos")
                if angles is not None and angles == match_table(find, sin, "sin"):
                    return x, angles
    return None


def is_turned(find: Matcher, value: Value, a: Value) -> bool:
    """Match concat(-second half of a, first half of a)."""
    op = find.op(value, "concat")
    if op is None or len(op.operands) != 2:
        return False
    width = a.type.shape[-1]
    half = width // 2
    second = find.last_axis_slice(find.source(op.operands[0], "neg"))
    return second == (a, half, width) and find.last_axis_slice(op.operands[1]) == (a, 0, half)


def match_table(find: Matcher, value: Value, function: str) -> Angles | None:
    """Match concat(m, m) where m mixes the three axes of function(positions * inv_freq) * scaling."""
    doubled = find.op(find.through(value, "reshape"), "concat")
    if doubled is None or len(doubled.operands) != 2 or len(set(doubled.operands)) != 1:
        return None
    mixed = match_mix(find, doubled.operands[0])
    if mixed is None:
        return None
    base, sections = mixed
    scaled = find.op(base, "mul_scalar")
    scaling = float(scaled.attrs["value"]) if scaled else 1.0
    product = find.source(scaled.operands[0] if scaled else base, function)
    for positions, frequencies in find.either(product, "mul"):
        constant = find.op(find.through(frequencies, "reshape"), "constant")
        if constant is None:
            continue
        source = find.through(positions, "reshape", "cast")
        if source.type.rank == 2 and source.type.shape[0] == 3:
            return Angles(source, constant.attrs["values"], sections, scaling)
    return None


def match_mix(find: Matcher, value: Value) -> tuple[Value, tuple[int, int, int]] | None:
    """Match axis 0 of a base, every third angle of it replaced by axis 1 and axis 2."""
    counts = []
    for axis in (2, 1):
        update = find.op(value, "slice_update", start=axis, step=3)
        part = find.op(update.operands[1], "slice", start=axis, step=3) if update else None
        base = axis_of(find, part.operands[0], axis) if part else None
        if update is None or part is None or base is None:
            return None
        counts.append((part.result.type.shape[-1], base))
        value = update.operands[0]
    base = axis_of(find, value, 0)
    (height_width, first), (height, second) = counts
    if base is None or base != first or base != second:
        return None
    half = value.type.shape[-1]
    return base, (half - height - height_width, height, height_width)


def axis_of(find: Matcher, value: Value, axis: int) -> Value | None:
    """Match base[axis] of a base [3, T, R/2]; return the base."""
    return find.source(
        find.through(value, "reshape"), "slice", axis=0, start=axis, stop=axis + 1, step=1
    )
