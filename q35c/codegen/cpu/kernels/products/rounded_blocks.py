"""Blocks of a product whose columns are rounded to int8 group by group, beside the product.

Threads share the blocks evenly, so that a boundary between two of them may cut a group. A thread leaves exact columns in
scratch: those of a whole group in its own part, where they stay in L2, those of a cut group where the others
see them. Who ends a group's last block rounds it. Which thread that is changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.script import tirx as T

from q35c.codegen.cpu.kernels.family import Room
from q35c.codegen.cpu.kernels.products.product import Operands, Product
from q35c.codegen.cpu.kernels.rows.round_int8 import Rounding, round_group
from q35c.codegen.cpu.kernels.vectors import Expr, ramp


@dataclass(frozen=True)
class RoundedRows:
    """Where the columns of one matrix go: rounded rows, and the product's y, scratch f32 [rows, group], until then.

    The thread's own part of the scratch begins with row `own` and has `own_rows`; a group that is cut, or has more rows, has
    as many rows as the product, from `cut` on by its number. `arrivals` counts from `counter` on, for each group, the blocks
    that threads have ended of a cut one; it holds zeros before and after.
    """

    q: Expr
    own: Expr
    own_rows: Expr
    cut: Expr
    arrivals: Expr
    counter: Expr


def sweep_rounded(
    product: Product,
    rounding: Rounding,
    operands: Operands,
    rows: RoundedRows,
    blocks: tuple[Expr, Expr],
    positions: tuple[Expr, Expr],
) -> None:
    """Emit a thread's blocks of a matrix for the rows at some positions, and the rounding of what they complete.

    `operands.block` is the matrix's first in `w`, and `y_row` gives rows of q. A group is a multiple of a block's columns,
    and the matrix one of a group.
    """
    (first, last), (begin, end) = blocks, positions
    span = T.int64(rounding.group // product.block_outputs)
    low, high = T.Bind(T.truncdiv(first, span)), T.Bind(T.truncdiv(last + span - 1, span))
    with T.serial(T.Select(first < last, high - low, T.int64(0))) as item:
        number = T.Bind(low + item)
        start = T.Bind(T.max(first, number * span))
        count = T.Bind(T.min(last, (number + 1) * span) - start)
        is_own = tirx.And(count == span, end - begin <= rows.own_rows)
        part = T.Bind(T.Select(is_own, rows.own, rows.cut + number * (end - begin)))

        def scratch_row(position: Expr, part: Expr = part) -> Expr:
            return part + (position - begin)

        exact = replace(operands, y_row=scratch_row)
        with T.serial(count) as at:
            block, column_block = operands.block + (start + at), start + at - number * span
            product.sweep(replace(exact, block=block, column_block=column_block), begin, end)
        with T.If(_is_complete(rows, number, count, span)), T.Then(), T.serial(end - begin) as i:
            row = T.Bind(part + i)
            round_group(
                rounding.layout,
                rounding.isa,
                lambda k: operands.y[row, ramp(k, rounding.isa.lanes)],
                T.Bind(operands.y_row(begin + i)),
                rows.q,
                number,
            )


def _is_complete(rows: RoundedRows, number: Expr, count: Expr, span: Expr) -> Expr:
    """Tell whether this thread ended a group; true at once if all its blocks were this thread's."""
    counter = T.address_of(rows.arrivals[rows.counter + number])
    counts = (T.cast(value, "int32") for value in (count, span))
    return T.Bind(T.call_extern("int32", "q35c_arrive", counter, *counts)) != 0


def rounding_scratch(group: int, columns: int, room: Room) -> int:
    """Return the bytes of scratch of a kernel that rounds the `columns` values a row that it makes."""
    return 4 * room.tokens * (group * room.threads + columns)
