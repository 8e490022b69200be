"""Round rows to int8, with a scale and sums of the codes for each group of values.

    scale = max |x| / 127      q = nearest(x / scale)      sum = -32 * sum of q

A row becomes int32 words (layouts/rows.py). Its sums serve weights that are stored with an offset (products/integer_tile.py),
its starts the sums of products/narrow_sums.py, where there is no VNNI. A group that holds NaN or infinity gets such a scale, so what is not finite stays so. The limit is the
bandwidth of the read. Threads split (row, group) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.family import Family, rounding
from q35c.codegen.cpu.kernels.vectors import (
    STACK,
    Expr,
    bits,
    from_bits,
    largest_magnitude,
    magnitude,
    ramp,
    share,
    splat,
    splat_int,
    vector,
)
from q35c.formats.integer import SUM_INPUTS
from q35c.layouts.rows import SUM_FACTOR, IntegerRow

_ROUND = (
    12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the mantissa
)
_ROUND_BITS = 0x4B400000


def row_layout(K: int, group: int, isa: Isa) -> IntegerRow:
    """Return how a row of K values is laid out: with starts where bytes have no product of their own."""
    return IntegerRow(K, group, has_starts=not isa.offers("dot4_u8s8"))


def quantize_rows(K: int, group: int, isa: Isa, pairs: int = 1) -> PrimFunc:
    """Make the kernel (X f32 [T * pairs, K], Q i32 [T * pairs, ..] in rows of `IntegerRow`, T, ld_x, ld_q, tid, nt)."""
    layout = row_layout(K, group, isa)

    @T.prim_func(private=True, s_tir=True)
    def quantize_rows_kernel(
        X: T.handle("float32"),
        Q: T.handle("int32"),
        tokens: T.int64,
        ld_x: T.int64,
        ld_q: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        rows: T.let[T.int64] = tokens * pairs
        x = T.decl_buffer((rows, ld_x), "float32", data=X)
        q = T.decl_buffer((rows, ld_q), "int32", data=Q)
        first: T.let[T.int64] = share(rows * layout.groups, tid, nt)
        last: T.let[T.int64] = share(rows * layout.groups, tid + 1, nt)
        for item in T.serial(last - first):
            row: T.let[T.int64] = T.truncdiv(first + item, T.int64(layout.groups))
            number: T.let[T.int64] = first + item - row * layout.groups
            quantize_group(layout, isa, x, row, q, number)
        return T.int32(0)

    return quantize_rows_kernel


def quantize_group(layout: IntegerRow, isa: Isa, x: Expr, row: Expr, q: Expr, number: Expr) -> None:
    """Emit the rounding of one group of a row; call it as a statement inside TVMScript."""
    rest = layout.K % layout.group
    if not rest:
        start = number * layout.group
        round_group(layout, isa, lambda at: x[row, ramp(start + at, isa.lanes)], row, q, number)
        return
    with T.If(number < layout.groups - 1):
        with T.Then():
            start = number * layout.group
            round_group(layout, isa, lambda at: x[row, ramp(start + at, isa.lanes)], row, q, number)
        with T.Else():
            padded = T.alloc_buffer((layout.group,), "float32", annotations=STACK)
            for v in range(0, layout.group, isa.lanes):
                T.buffer_store(padded, splat(0.0, isa.lanes), [ramp(v, isa.lanes)])
            with T.serial(rest) as k:
                T.buffer_store(padded, x[row, number * layout.group + k], [k])
            round_group(layout, isa, lambda at: padded[ramp(at, isa.lanes)], row, q, number)


@dataclass(frozen=True)
class Rounding:
    """Let a kernel round the rows of K values that it writes, part by part; with group 0 it rounds nothing."""

    K: int
    group: int
    isa: Isa

    @property
    def layout(self) -> IntegerRow:
        return row_layout(self.K, self.group, self.isa)

    def columns(self, y: Expr, row: Expr, q: Expr, begin: Expr, count: int) -> None:
        """Emit the rounding of `count` columns of row y[row] from `begin`, both multiples of the group."""
        if self.group:
            first = T.Bind(T.truncdiv(begin, T.int64(self.group)))
            with T.serial(T.int64(count // self.group)) as number:
                quantize_group(self.layout, self.isa, y, row, q, first + number)


def round_group(
    layout: IntegerRow, isa: Isa, load: Callable[[Expr], Expr], row: Expr, q: Expr, number: Expr
) -> None:
    """Emit largest magnitude, scale, codes and their sums of one group; load(k) is its vector from value k on."""
    L = isa.lanes
    # Loops, as LLVM takes seconds for the same without them.
    values = T.alloc_buffer((layout.group,), "float32", annotations=STACK)
    largest = T.alloc_buffer((1, L), "int32")
    T.buffer_store(largest, splat_int(0, L), [0, ramp(0, L)])
    with T.serial(T.int64(layout.group // L)) as v:
        x = T.Bind(load(v * L))
        T.buffer_store(values, x, [ramp(v * L, L)])
        T.buffer_store(largest, T.max(largest[0, ramp(0, L)], magnitude(x, L)), [0, ramp(0, L)])
    top = T.Bind(largest_magnitude([from_bits(largest[0, ramp(0, L)], L)], L))
    inverse = T.Bind(splat(T.Select(top == T.float32(0), T.float32(0), T.float32(127) / top), L))
    T.buffer_store(q, bits(top * T.float32(1 / 127), 1), [row, layout.scales + number])
    total = T.alloc_buffer((2, L), "int32")  # of the group, and of 32 values
    T.buffer_store(total, splat_int(0, L), [0, ramp(0, L)])
    with T.serial(T.int64(layout.group // SUM_INPUTS)) as part:
        T.buffer_store(total, splat_int(0, L), [1, ramp(0, L)])
        with T.serial(T.int64(SUM_INPUTS // L)) as v:
            at = T.Bind(part * SUM_INPUTS + v * L)
            shifted = values[ramp(at, L)] * inverse + splat(_ROUND, L)
            code = T.Bind(bits(shifted, L) - splat_int(_ROUND_BITS, L))
            T.buffer_store(total, total[1, ramp(0, L)] + code, [1, ramp(0, L)])
            words = T.reinterpret(T.cast(code, vector("int8", L)), dtype=vector("int32", L // 4))
            word = number * (layout.group // 4) + T.truncdiv(at, 4)
            T.buffer_store(q, words, [row, ramp(word, L // 4)])
        T.buffer_store(total, total[0, ramp(0, L)] + total[1, ramp(0, L)], [0, ramp(0, L)])
        if layout.starts_in_group:
            start = layout.starts + number * layout.starts_in_group + part
            T.buffer_store(q, _start(total[1, ramp(0, L)], L), [row, start])
    whole = _sum(total[0, ramp(0, L)])
    T.buffer_store(q, T.int32(SUM_FACTOR) * whole, [row, layout.sums + number])


def _start(sums: Expr, lanes: int) -> Expr:
    """Return the word with the sums of both halves of some codes that were added up lane by lane."""
    kept = [T.int32(-(lane % 4 // 2)) for lane in range(lanes)]
    mask = tirx.Shuffle(kept, [T.int32(lane) for lane in range(lanes)])
    second = T.Bind(_sum(sums & mask))
    first = T.Bind(_sum(sums) - second)
    low = T.bitwise_and(T.int32(SUM_FACTOR) * first, T.int32(0xFFFF))
    return T.bitwise_or(low, T.shift_left(T.int32(SUM_FACTOR) * second, T.int32(16)))


def _sum(lanes: Expr) -> Expr:
    add = T.llvm_lookup_intrinsic_id("llvm.vector.reduce.add")
    return T.call_llvm_pure_intrin(add, lanes, dtype="int32")


QUANTIZE_ROWS = Family(
    quantize_rows,
    "x q tokens ld_x ld_q",
    writes="q",
    cost=lambda p: rounding(p, f"q8g{p['group']}"),
)
