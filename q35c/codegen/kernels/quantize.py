"""Round rows to int8, with a scale and the sum of the codes for each group of values.

    scale = max |x| / 127      q = nearest(x / scale)      sum = -8 * sum of q

A row becomes int32 words: its codes, four in a word and zero behind the last value, then the f32 bits of its scales,
then its sums; the sums serve weights that are stored with an offset (quantized_tile.py). A group that holds NaN or
infinity gets such a scale, so what is not finite stays so. The limit is the bandwidth of the read. Threads split
(row, group) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.common import (
    LINE_WORDS,
    STACK,
    Expr,
    bits,
    ceil_div,
    largest_magnitude,
    ramp,
    share,
    splat,
    splat_int,
    vector,
)

_ROUND = (
    12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the mantissa
)
_ROUND_BITS = 0x4B400000
SUM_FACTOR = -8  # the zero point of 4-bit weights; that of 8-bit ones is a power of two more


@dataclass(frozen=True)
class RowLayout:
    """Lay out a rounded row of K values in int32 words."""

    K: int
    group: int

    @property
    def groups(self) -> int:
        return ceil_div(self.K, self.group)

    @property
    def scales(self) -> int:
        """Word of the first scale."""
        return self.groups * self.group // 4

    @property
    def sums(self) -> int:
        """Word of the first sum."""
        return self.scales + self.groups

    @property
    def words(self) -> int:
        """Words of a row, a whole number of cache lines."""
        return ceil_div(self.sums + self.groups, LINE_WORDS) * LINE_WORDS


@dataclass(frozen=True)
class RowBuffers:
    """Hold rounded rows under three types: bytes, int32 and f32 words, all [rows, ..]."""

    codes: Expr
    words: Expr
    scales: Expr


def quantize_rows(K: int, group: int, isa: Isa, pairs: int = 1) -> PrimFunc:
    """Make the kernel (X f32 [T * pairs, K], Q8, QI, QF, T, ld_x, ld_q, tid, nt).

    Q8, QI and QF are one address under three types: rows of `RowLayout`, `ld_q` words apart.
    """
    layout = RowLayout(K, group)

    @T.prim_func(private=True, s_tir=True)
    def quantize_rows_kernel(
        X: T.handle("float32"),
        Q8: T.handle("int8"),
        QI: T.handle("int32"),
        QF: T.handle("float32"),
        tokens: T.int64,
        ld_x: T.int64,
        ld_q: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        # No noalias: the three are one.
        rows: T.let[T.int64] = tokens * pairs
        x = T.decl_buffer((rows, ld_x), "float32", data=X)
        codes = T.decl_buffer((rows, ld_q * 4), "int8", data=Q8)
        words = T.decl_buffer((rows, ld_q), "int32", data=QI)
        scales = T.decl_buffer((rows, ld_q), "float32", data=QF)
        first: T.let[T.int64] = share(rows * layout.groups, tid, nt)
        last: T.let[T.int64] = share(rows * layout.groups, tid + 1, nt)
        for item in T.serial(last - first):
            row: T.let[T.int64] = T.truncdiv(first + item, T.int64(layout.groups))
            number: T.let[T.int64] = first + item - row * layout.groups
            quantize_group(layout, isa, x, row, RowBuffers(codes, words, scales), number)
        return T.int32(0)

    return quantize_rows_kernel


def quantize_group(
    layout: RowLayout, isa: Isa, x: Expr, row: Expr, out: RowBuffers, number: Expr
) -> None:
    """Emit the rounding of one group of a row; call it as a statement inside TVMScript."""
    rest = layout.K % layout.group
    if not rest:
        _round_group(layout, isa, lambda at: x[row, number * layout.group + at], row, out, number)
        return
    with T.If(number < layout.groups - 1):
        with T.Then():
            _round_group(
                layout, isa, lambda at: x[row, number * layout.group + at], row, out, number
            )
        with T.Else():
            padded = T.alloc_buffer((layout.group,), "float32", annotations=STACK)
            for v in range(0, layout.group, isa.lanes):
                T.buffer_store(padded, splat(0.0, isa.lanes), [ramp(v, isa.lanes)])
            with T.serial(rest) as k:
                T.buffer_store(padded, x[row, number * layout.group + k], [k])
            _round_group(layout, isa, lambda at: padded[at], row, out, number)


def _round_group(
    layout: RowLayout, isa: Isa, load, row: Expr, out: RowBuffers, number: Expr
) -> None:
    """Emit largest magnitude, scale, codes and their sum."""
    L = isa.lanes
    vectors = [ramp(v, L) for v in range(0, layout.group, L)]
    top = T.Bind(largest_magnitude([load(at) for at in vectors], L))
    inverse = T.Bind(splat(T.Select(top == T.float32(0), T.float32(0), T.float32(127) / top), L))
    T.buffer_store(out.scales, top * T.float32(1 / 127), [row, layout.scales + number])
    total = T.alloc_buffer((1, L), "int32")
    T.buffer_store(total, splat_int(0, L), [0, ramp(0, L)])
    for place, at in enumerate(vectors):
        shifted = load(at) * inverse + splat(_ROUND, L)
        code = T.Bind(bits(shifted, L) - splat_int(_ROUND_BITS, L))
        T.buffer_store(total, total[0, ramp(0, L)] + code, [0, ramp(0, L)])
        column = number * layout.group + place * L
        T.buffer_store(out.codes, T.cast(code, vector("int8", L)), [row, ramp(column, L)])
    add = T.llvm_lookup_intrinsic_id("llvm.vector.reduce.add")
    whole = T.call_llvm_pure_intrin(add, total[0, ramp(0, L)], dtype="int32")
    T.buffer_store(out.words, T.int32(SUM_FACTOR) * whole, [row, layout.sums + number])
