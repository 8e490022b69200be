"""How a picture's patches enter a vision tower: bytes as numbers, and learned positions between rows of a table.

    scale_pixels      y[t, k] = scale * x[t, k] + shift
    interpolate_rows  y[t, d] = sum over j of  weight[t, j] * table[tap[t, j], d]

Threads split the rows. The limit is bandwidth: of the writes, and of the rows that are looked up, most of which a
neighbouring patch has read.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.family import F32_BYTES, Family, elementwise, row_bytes
from q35c.codegen.cpu.kernels.rows.round_bf16 import bf16_element, store_bf16
from q35c.codegen.cpu.kernels.vectors import Expr, ramp, share, splat, vector


def scale_pixels(K: int, scale: float, shift: float, isa: Isa, result: str = "f32") -> PrimFunc:
    """Make the kernel (X u8 [T, K] dense, Y, T, ld_y, tid, nt).

    Y is f32, or rows as `round_rows` leaves them if the `result` is "bf16".
    """
    L = isa.lanes
    is_rounded = result == "bf16"
    element, halves = bf16_element(isa) if is_rounded else ("float32", 1)

    @T.prim_func(private=True, s_tir=True)
    def scale_pixels_kernel(
        X: T.handle("uint8"),
        Y: T.handle(element),
        tokens: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        x = T.decl_buffer((tokens, K), "uint8", data=X)
        y = T.decl_buffer((tokens, ld_y * halves), element, data=Y)
        first: T.let[T.int64] = share(tokens, tid, nt)
        for item in T.serial(share(tokens, tid + 1, nt) - first):
            row: T.let[T.int64] = first + item
            for v in T.serial(K // L):
                _store(x, y, row, v * L, L, scale, shift, is_rounded)
            for k in T.serial(K % L):
                _store(x, y, row, K // L * L + k, 1, scale, shift, is_rounded)
            _fill_word(y, row, K, halves)
        return T.int32(0)

    return scale_pixels_kernel


def _store(
    x: Expr, y: Expr, row: Expr, column: Expr, L: int, scale: float, shift: float, is_rounded: bool
) -> None:
    at = ramp(column, L)
    number = T.cast(T.cast(x[row, at], vector("int32", L)), vector("float32", L))
    value = number * splat(scale, L) + splat(shift, L)
    if is_rounded:
        store_bf16(y, value, row, at, L)
    else:
        T.buffer_store(y, value, [row, at])


def _fill_word(y: Expr, row: Expr, K: int, halves: int) -> None:
    """Emit the zero behind an odd last value, where two share a word."""
    if K % halves:
        T.buffer_store(y, T.uint16(0), [row, T.int64(K)])


def interpolate_rows(D: int, rows: int, taps: int, isa: Isa) -> PrimFunc:
    """Make the kernel (TABLE f32 [rows, D], TAPS i32, WEIGHTS f32 [T, taps] dense, Y f32 [T, D], T, ld_y, tid, nt).

    D is a multiple of 16. Taps outside the table read its first or last row.
    """
    L = isa.lanes

    @T.prim_func(private=True, s_tir=True)
    def interpolate_rows_kernel(
        TABLE: T.handle("float32"),
        TAPS: T.handle("int32"),
        WEIGHTS: T.handle("float32"),
        Y: T.handle("float32"),
        tokens: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        table = T.decl_buffer((rows, D), "float32", data=TABLE)
        tap = T.decl_buffer((tokens, taps), "int32", data=TAPS)
        weight = T.decl_buffer((tokens, taps), "float32", data=WEIGHTS)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        first: T.let[T.int64] = share(tokens, tid, nt)
        for item in T.serial(share(tokens, tid + 1, nt) - first):
            row: T.let[T.int64] = first + item
            for v in T.serial(D // L):
                y[row, ramp(v * L, L)] = splat(0.0, L)
            for j in T.serial(taps):
                place: T.let[T.int32] = T.max(0, T.min(tap[row, j], rows - 1))
                for v in T.serial(D // L):
                    y[row, ramp(v * L, L)] = (
                        y[row, ramp(v * L, L)]
                        + splat(weight[row, j], L) * table[place, ramp(v * L, L)]
                    )
        return T.int32(0)

    return interpolate_rows_kernel


SCALE_PIXELS = Family(
    scale_pixels,
    "x y tokens ld_y",
    writes="y",
    cost=lambda p: elementwise((p["K"] + row_bytes(p["K"], p["result"])) / F32_BYTES, 2 * p["K"]),
)
INTERPOLATE_ROWS = Family(
    interpolate_rows,
    "table taps weights y tokens ld_y",
    writes="y",
    cost=lambda p: elementwise((p["taps"] + 1) * p["D"], 2 * p["taps"] * p["D"]),
)
