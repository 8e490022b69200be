"""Fuse attention over a whole picture between its input and output projections."""

from __future__ import annotations

from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.ir.types import Shape
from q35c.passes.match import Matcher

Angles = tuple[Value, tuple[float, ...]]  # places, inv_freq
HEADS_FIRST = (1, 0, 2)


def fuse_picture_attention(graph: Graph) -> Graph:
    """Replace the split of q, k and v, the rotation of whole heads and attention to all by picture_attention.

    Before:  full_attention of transposed heads [T, H, D]: rotated q, rotated k, v, all parts of one qkv [T, 3, H, D]
             rotated x = x * cos + concat(-x[half:], x[:half]) * sin
             cos = concat(m, m), m = cos(places * inv_freq) of the rows, then of the columns; sin likewise
    After:   picture_attention(qkv, axial_rotary_table(places))
    As IR text: tests/passes/fuse_picture_attention/two_layers.txt

    The table is built once and shared by all layers. Left alone: parts of several values or in another order, grouped
    queries, a cosine and a sine of different angles.
    """
    find, out = Matcher(graph), Rewriter(graph)
    tables: dict[Angles, Value] = {}
    for op in graph.ops:
        match = match_attention(find, op)
        if match is None:
            out.copy(op)
            continue
        qkv, angles = match
        if angles not in tables:
            places, inv_freq = angles
            tables[angles] = out.emit("axial_rotary_table", out.new(places), inv_freq=inv_freq)
        shape = op.result.type.shape
        rows = out.emit(
            "picture_attention",
            out.new(qkv),
            tables[angles],
            heads=shape[1],
            scale=op.attrs["scale"],
        )
        out.replace(op.result, out.emit("reshape", rows, shape=shape))
    return out.done()


def match_attention(find: Matcher, op: Op) -> tuple[Value, Angles] | None:
    """Match attention of the three parts of one value [T, 3 * H * D], q and k rotated by the same angles."""
    if op.kind != "full_attention":
        return None
    q, k, v = (find.source(value, "transpose", perm=HEADS_FIRST) for value in op.operands)
    turned_q, turned_k = match_rotated(find, q), match_rotated(find, k)
    if turned_q is None or turned_k is None or turned_q[1] != turned_k[1] or v is None:
        return None
    parts = [match_part(find, x, i) for i, x in enumerate((turned_q[0], turned_k[0], v))]
    if parts[0] is None or any(part != parts[0] for part in parts):
        return None
    return parts[0], turned_q[1]


def match_part(find: Matcher, value: Value, number: int) -> Value | None:
    """Match part `number` [T, H, D] of a value [T, 3 * H * D]; return the value."""
    cut = find.through(value, "reshape")
    whole = find.source(cut, "slice", axis=0, start=number, stop=number + 1, step=1)
    apart = find.source(whole, "transpose", perm=(1, 0, 2, 3))
    tokens, *head = value.type.shape
    if (
        apart is None
        or apart.type.shape != (tokens, 3, *head)
        or cut.type.shape[1:] != value.type.shape
    ):
        return None
    source = find.through(apart, "reshape")
    return source if source.type.rank == 2 and source.type.shape[0] == tokens else None


def match_rotated(find: Matcher, value: Value | None) -> tuple[Value, Angles] | None:
    """Match x * cos + turned(x) * sin of heads x [T, H, D]; return x and the angles."""
    for direct, crossed in find.either(value, "add"):
        for x, cos in find.either(direct, "mul"):
            for turned, sin in find.either(crossed, "mul"):
                if x.type.rank != 3 or x.type != direct.type or not is_turned(find, turned, x):
                    continue
                shape = (x.type.shape[0], 1, x.type.shape[2])
                angles = match_table(find, cos, "cos", shape)
                if angles is not None and angles == match_table(find, sin, "sin", shape):
                    return x, angles
    return None


def is_turned(find: Matcher, value: Value, x: Value) -> bool:
    """Match concat(-second half of x, first half of x)."""
    parts, width = find.joined(value), x.type.shape[-1]
    if len(parts) != 2 or not isinstance(width, int):
        return False
    second = find.last_axis_slice(find.source(parts[0], "neg"))
    return second == (x, width // 2, width) and find.last_axis_slice(parts[1]) == (x, 0, width // 2)


def match_table(find: Matcher, value: Value, function: str, shape: Shape) -> Angles | None:
    """Match the view of concat(m, m) [T, D], m the rows' and then the columns' function(places * inv_freq)."""
    doubled = find.through(value, "reshape")
    parts = find.joined(doubled)
    if value.type.shape != shape or doubled.type.shape != (shape[0], shape[2]) or len(parts) != 2:
        return None
    axes = [axis_of(find, part, axis) for axis, part in enumerate(find.joined(parts[0]))]
    if parts[0] != parts[1] or len(axes) != 2 or axes[0] != axes[1]:
        return None
    for positions, frequencies in find.either(find.source(axes[0], function), "mul"):
        constant = find.op(find.through(frequencies, "reshape"), "constant")
        places = find.through(positions, "reshape", "cast")
        if constant is None or positions.type.shape != (shape[0], 2, 1):
            continue
        values = constant.attrs["values"]
        is_each = axes[0] is not None and axes[0].type.shape == (shape[0], 2, len(values))
        if is_each and places.type.dtype == "i32" and places.type.shape == (shape[0], 2):
            return places, values
    return None


def axis_of(find: Matcher, value: Value, axis: int) -> Value | None:
    """Match base[:, axis] of a base [T, 2, R/4]; return the base."""
    cut = find.through(value, "reshape")
    base = find.source(cut, "slice", axis=1, start=axis, stop=axis + 1, step=1)
    tokens, width = value.type.shape
    return base if base is not None and base.type.shape == (tokens, 2, width) else None
