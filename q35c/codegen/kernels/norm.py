"""RMS norm over whole rows.

    y[t, d] = x[t, d] / sqrt(mean_d x[t, d]^2 + eps) * (offset + w[d])

Threads split the rows. A row is read twice, the second time from L1: the limit is the bandwidth of
the first read and of the write.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.common import Expr, hsum, ramp, share, splat, vrsqrt

_SUMS = 4  # independent sums of squares: one would wait 4 cycles for each addition


def rms_norm(D: int, eps: float, offset: float, isa: Isa) -> PrimFunc:
    """Make the kernel (X, W f32 [D], Y, T, ld_x, ld_y, tid, nt) for X and Y f32 [T, D].

    Y may be X itself with the same stride.
    """
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
