"""Let the ops that make rows round them on the way out."""

from __future__ import annotations

from collections.abc import Callable

from q35c.formats.registry import integer_format
from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Op, Value
from q35c.ir.ops import ROUNDING
from q35c.ir.types import static

# How many columns of a row are made at a time; they must be whole groups.
COLUMNS_AT_A_TIME: dict[str, Callable[[Op], Value]] = {
    "rms_norm": lambda op: op.result,
    "linear_swiglu": lambda op: op.result,
    "stateful_gated_delta_net": lambda op: op["norm_w"],  # a value head
    "scheduled_gated_attention": lambda op: op["q_norm"],  # a query head
}
KEEPS_NOTHING = ("linear_swiglu",)  # writes rounded rows only
# These round to bf16 alone, and keep nothing either: what a vision tower makes for thousands of rows at once.
TO_BF16 = ("scale_pixels", "layer_norm", "linear_bias_gelu", "scheduled_picture_attention")


def fuse_rounding(graph: Graph) -> Graph:
    """Round rows where they are made, if they are rounded to int8; to bf16 where a vision tower makes them.

    Before:
        graph g scheduled {
          input %x: f32[T, 64]
          weight @norm: f32[64]
          weight @w: i4g32[8, 64]
          weight @router: f32[4, 64]
          %0: f32[T, 64] = rms_norm(%x, @norm) {eps = 1e-06, offset = 1.0}
          %1: q8g32[T, 64] = quantize_rows(%0) {dtype = "q8g32"}
          %2: f32[T, 8] = linear(%1, @w)
          %3: f32[T, 4] = linear(%0, @router)
          return %2, %3
        }
    After:
        graph g scheduled {
          input %x: f32[T, 64]
          weight @norm: f32[64]
          weight @w: i4g32[8, 64]
          weight @router: f32[4, 64]
          %0: f32[T, 64], %1: q8g32[T, 64] = rounded_rms_norm(%x, @norm)
              {dtype = "q8g32", eps = 1e-06, is_kept = true, offset = 1.0}
          %2: f32[T, 8] = linear(%1, @w)
          %3: f32[T, 4] = linear(%0, @router)
          return %2, %3
        }

    Left alone: rows of text that are rounded to bf16, groups that span what is made at a time, and products whose exact rows
    are read too.
    """
    readers: dict[Value, list[Op | None]] = {value: [None] for value in graph.outputs}
    for op in graph.ops:
        for value in op.operands:
            readers.setdefault(value, []).append(op)
    out = Rewriter(graph)
    done: set[Value] = set()
    for op in graph.ops:
        if done.intersection(op.results):
            continue
        rounding = match_rounding(op, readers)
        if rounding is None:
            out.copy(op)
            continue
        is_kept = len(readers[op.result]) > 1
        attrs = {**op.attrs.to_dict(), "dtype": rounding.attrs["dtype"], "is_kept": is_kept}
        made = out.emit(f"rounded_{op.kind}", *map(out.new, op.operands), **attrs)
        exact, rows = made if is_kept else (None, made)
        out.replace(rounding.result, rows)
        if exact is not None:
            out.replace(op.result, exact)
        done.add(rounding.result)
    return out.done()


def match_rounding(op: Op, readers: dict[Value, list[Op | None]]) -> Op | None:
    """Return the rounding of an op's result that the op can do itself."""
    if op.kind in TO_BF16:
        return match_bf16(op, readers)
    if op.kind not in ROUNDING:
        return None
    columns = static(COLUMNS_AT_A_TIME[op.kind](op).type.shape[-1])
    read_by = readers.get(op.result, [])
    for reader in read_by:
        form = (
            integer_format(reader.attrs["dtype"])
            if reader is not None and reader.kind == "quantize_rows"
            else None
        )
        if form is not None and columns % form.group == 0:
            return None if len(read_by) > 1 and op.kind in KEEPS_NOTHING else reader
    return None


def match_bf16(op: Op, readers: dict[Value, list[Op | None]]) -> Op | None:
    """Return the rounding to bf16 that alone reads an op's result."""
    (reader, *others) = readers.get(op.result, [None])
    if others or reader is None or reader.kind != "quantize_rows":
        return None
    return reader if reader.attrs["dtype"] == "bf16" else None
