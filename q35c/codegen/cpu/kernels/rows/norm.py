"""RMS norm over whole rows.

    y[t, d] = x[t, d] / sqrt(mean_d x[t, d]^2 + eps) * (offset + w[d])

Threads split the rows. A row is read twice, the second time from L1: the limit is the bandwidth of
the first read and of the write.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.family import (
    F32_BYTES,
    Family,
    Parameters,
    elementwise,
    rounded_bytes,
)
from q35c.codegen.cpu.kernels.rows.round_int8 import Rounding, round_group
from q35c.codegen.cpu.kernels.vectors import Expr, hsum, ramp, share, splat, vrsqrt

_SUMS = 4  # independent sums of squares: one would wait 4 cycles for each addition


def rms_norm(
    D: int, eps: float, offset: float, isa: Isa, group: int = 0, is_kept: bool = True
) -> PrimFunc:
    """Make the kernel (X, W f32 [D], Y, T, ld_x, ld_y, tid, nt) for X and Y f32 [T, D].

    Y may be X itself with the same stride. With a `group`, of which D is a multiple, (X, W, Y, Q, T, ld_x, ld_y, ld_q, tid,
    nt): Q gets what `quantize_rows` makes of Y, and Y, not X then, is written only if `is_kept`.
    """
    if group:
        return _rounding(D, eps, offset, Rounding(D, group, isa), is_kept)
    L = isa.lanes
    vectors = D // L

    @T.prim_func(private=True, s_tir=True)
    def rms_norm_kernel(
        X: T.handle("float32"),
        W: T.handle("float32"),
        Y: T.handle("float32"),
        tokens: T.int64,
        ld_x: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        # No noalias: Y may be X.
        x = T.decl_buffer((tokens, ld_x), "float32", data=X)
        w = T.decl_buffer((D,), "float32", data=W)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        first: T.let[T.int64] = share(tokens, tid, nt)
        last: T.let[T.int64] = share(tokens, tid + 1, nt)
        for item in T.serial(last - first):
            row: T.let[T.int64] = first + item
            total: T.let[T.float32] = _sum_of_squares(x, row, D, L)
            scale: T.let[T.float32] = vrsqrt(total * T.float32(1.0 / D) + T.float32(eps), 1)
            for v in T.serial(vectors):
                y[row, ramp(v * L, L)] = (
                    x[row, ramp(v * L, L)]
                    * splat(scale, L)
                    * (w[ramp(v * L, L)] + splat(offset, L))
                )
            for d in T.serial(D - vectors * L):
                y[row, vectors * L + d] = (
                    x[row, vectors * L + d] * scale * (w[vectors * L + d] + T.float32(offset))
                )
        return T.int32(0)

    return rms_norm_kernel


def _rounding(D: int, eps: float, offset: float, rounding: Rounding, is_kept: bool) -> PrimFunc:
    """Make the kernel that rounds: threads split (row, group) pairs, and each sums up the rows that it touches."""
    isa, groups = rounding.isa, rounding.layout.groups

    def normed(
        x: Expr, w: Expr, y: Expr, row: Expr, scale: Expr, begin: Expr
    ) -> Callable[[Expr], Expr]:
        def vector(k: Expr) -> Expr:
            at = ramp(begin + k, isa.lanes)
            value = x[row, at] * splat(scale, isa.lanes) * (w[at] + splat(offset, isa.lanes))
            if is_kept:
                value = T.Bind(value)
                T.buffer_store(y, value, [row, at])
            return value

        return vector

    @T.prim_func(private=True, s_tir=True)
    def rms_norm_rounding_kernel(
        X: T.handle("float32"),
        W: T.handle("float32"),
        Y: T.handle("float32"),
        Q: T.handle("int32"),
        tokens: T.int64,
        ld_x: T.int64,
        ld_y: T.int64,
        ld_q: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        x = T.decl_buffer((tokens, ld_x), "float32", data=X)
        w = T.decl_buffer((D,), "float32", data=W)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        q = T.decl_buffer((tokens, ld_q), "int32", data=Q)
        first: T.let[T.int64] = share(tokens * groups, tid, nt)
        last: T.let[T.int64] = share(tokens * groups, tid + 1, nt)
        top: T.let[T.int64] = T.truncdiv(first, T.int64(groups))
        for item in T.serial(T.truncdiv(last + (groups - 1), T.int64(groups)) - top):
            row: T.let[T.int64] = top + item
            total: T.let[T.float32] = _sum_of_squares(x, row, D, isa.lanes)
            scale: T.let[T.float32] = vrsqrt(total * T.float32(1.0 / D) + T.float32(eps), 1)
            begin: T.let[T.int64] = T.max(first - row * groups, T.int64(0))
            for at in T.serial(T.min(last - row * groups, T.int64(groups)) - begin):
                number: T.let[T.int64] = begin + at
                round_group(
                    rounding.layout,
                    rounding.isa,
                    normed(x, w, y, row, scale, number * rounding.group),
                    row,
                    q,
                    number,
                )
        return T.int32(0)

    return rms_norm_rounding_kernel


def _sum_of_squares(x: Expr, row: Expr, D: int, lanes: int) -> Expr:
    """Emit the sum of a row's squares and return it."""
    inner, step = ramp(0, lanes), _SUMS * lanes
    sums = T.alloc_buffer((_SUMS, lanes), "float32")

    def add(s: int, column: Expr) -> None:
        value = T.Bind(x[row, ramp(column, lanes)])
        T.buffer_store(sums, sums[s, inner] + value * value, [s, inner])

    for s in range(_SUMS):
        T.buffer_store(sums, splat(0.0, lanes), [s, inner])
    with T.serial(D // step) as group:
        for s in range(_SUMS):
            add(s, group * step + s * lanes)
    for s in range(D % step // lanes):
        add(s, D // step * step + s * lanes)
    total = sums[0, inner]
    for s in range(1, _SUMS):
        total = total + sums[s, inner]
    scalar = T.alloc_buffer((1,), "float32")
    T.buffer_store(scalar, hsum(total, lanes), [0])
    for column in range(D // lanes * lanes, D):
        T.buffer_store(scalar, scalar[0] + x[row, column] * x[row, column], [0])
    return scalar[0]


def _arguments(p: Parameters) -> str:
    return "x w y q tokens ld_x ld_y ld_q" if p.get("group") else "x w y tokens ld_x ld_y"


def _cost(p: Parameters) -> Cost:
    words = p["D"] * (2 if p.get("is_kept", True) else 1) + rounded_bytes(p, p["D"]) / F32_BYTES
    return elementwise(words, 4 * p["D"])


RMS_NORM = Family(rms_norm, _arguments, writes="y q", cost=_cost)
