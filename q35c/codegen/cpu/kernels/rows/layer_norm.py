"""Layer norm over whole rows, rounded to bf16 on the way if asked.

    y[t, d] = (x[t, d] - mean_d x[t, d]) / sqrt(var_d x[t, d] + eps) * w[d] + b[d]

The variance is that of the differences from the mean, so that a row far from zero loses no digits. Threads split the
rows. A row is read three times, all but the first from L1: the limit is the bandwidth of that read and of the write.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.family import F32_BYTES, Family, elementwise, row_bytes
from q35c.codegen.cpu.kernels.rows.round_bf16 import bf16_element, store_bf16
from q35c.codegen.cpu.kernels.vectors import Expr, hsum, ramp, share, splat, vrsqrt

_SUMS = 4  # independent sums: one would wait 4 cycles for each addition


def layer_norm(D: int, eps: float, isa: Isa, result: str = "f32") -> PrimFunc:
    """Make the kernel (X, W, B f32 [D], Y, T, ld_x, ld_y, tid, nt) for X f32 [T, D]; D is a multiple of 16.

    Y is f32, or rows as `round_rows` leaves them if the `result` is "bf16".
    """
    L = isa.lanes
    is_rounded = result == "bf16"
    element, halves = bf16_element(isa) if is_rounded else ("float32", 1)

    @T.prim_func(private=True, s_tir=True)
    def layer_norm_kernel(
        X: T.handle("float32"),
        W: T.handle("float32"),
        B: T.handle("float32"),
        Y: T.handle(element),
        tokens: T.int64,
        ld_x: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        x = T.decl_buffer((tokens, ld_x), "float32", data=X)
        w = T.decl_buffer((D,), "float32", data=W)
        b = T.decl_buffer((D,), "float32", data=B)
        y = T.decl_buffer((tokens, ld_y * halves), element, data=Y)
        first: T.let[T.int64] = share(tokens, tid, nt)
        for item in T.serial(share(tokens, tid + 1, nt) - first):
            row: T.let[T.int64] = first + item
            mean: T.let[T.float32] = _mean(D, L, _values(x, row, L))
            variance: T.let[T.float32] = _mean(D, L, _squares(x, row, L, mean))
            scale: T.let[T.float32] = vrsqrt(variance + T.float32(eps), 1)
            for v in T.serial(D // L):
                _store(x, w, b, y, row, v * L, L, mean, scale, is_rounded)
        return T.int32(0)

    return layer_norm_kernel


def _values(x: Expr, row: Expr, L: int) -> Callable[[Expr], Expr]:
    return lambda column: x[row, ramp(column, L)]


def _squares(x: Expr, row: Expr, L: int, mean: Expr) -> Callable[[Expr], Expr]:
    def square(column: Expr) -> Expr:
        difference = T.Bind(x[row, ramp(column, L)] - splat(mean, L))
        return difference * difference

    return square


def _mean(D: int, L: int, vector: Callable[[Expr], Expr]) -> Expr:
    """Emit the mean of a row's values, a vector at a time, and return it."""
    inner, step = ramp(0, L), _SUMS * L
    sums = T.alloc_buffer((_SUMS, L), "float32")

    def add(number: int, column: Expr) -> None:
        T.buffer_store(sums, sums[number, inner] + vector(column), [number, inner])

    for number in range(_SUMS):
        T.buffer_store(sums, splat(0.0, L), [number, inner])
    with T.serial(D // step) as group:
        for number in range(_SUMS):
            add(number, group * step + number * L)
    for number in range(D % step // L):
        add(number, D // step * step + number * L)
    total = (sums[0, inner] + sums[1, inner]) + (sums[2, inner] + sums[3, inner])
    return hsum(total, L) * T.float32(1.0 / D)


def _store(
    x: Expr, w: Expr, b: Expr, y: Expr, row: Expr, column: Expr, L: int, mean: Expr, scale: Expr, is_rounded: bool
) -> None:  # fmt: skip
    at = ramp(column, L)
    value = (x[row, at] - splat(mean, L)) * splat(scale, L) * w[at] + b[at]
    if is_rounded:
        store_bf16(y, value, row, at, L)
    else:
        T.buffer_store(y, value, [row, at])


LAYER_NORM = Family(
    layer_norm,
    "x w b y tokens ld_x ld_y",
    writes="y",
    cost=lambda p: elementwise(p["D"] + row_bytes(p["D"], p["result"]) / F32_BYTES, 8 * p["D"]),
)
