"""RMS norm over whole rows.

    y[t, d] = x[t, d] / sqrt(mean_d x[t, d]^2 + eps) * (offset + w[d])

Threads split the rows. A row is read twice, the second time from L1: the limit is the bandwidth of
the first read and of the write.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.common import hsum, ramp, share, splat, vrsqrt

_SUMS = 4  # independent sums of squares: one would wait 4 cycles for each addition


def rms_norm(D: int, eps: float, offset: float, isa: Isa) -> PrimFunc:
    """Make the kernel (X, W f32 [D], Y, T, ld_x, ld_y, tid, nt) for X and Y f32 [T, D].

    Y may be X itself with the same stride.
    """
    L = isa.lanes
    groups, vectors = D // (L * _SUMS), D // L

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
            squares = T.alloc_buffer((_SUMS, L), "float32")
            for s in T.unroll(_SUMS):
                squares[s, ramp(0, L)] = splat(0.0, L)
            for g in T.serial(groups):
                for s in T.unroll(_SUMS):
                    squares[s, ramp(0, L)] = (
                        squares[s, ramp(0, L)]
                        + x[row, ramp((g * _SUMS + s) * L, L)]
                        * x[row, ramp((g * _SUMS + s) * L, L)]
                    )
            for v in T.serial(vectors - groups * _SUMS):
                squares[0, ramp(0, L)] = (
                    squares[0, ramp(0, L)]
                    + x[row, ramp((groups * _SUMS + v) * L, L)]
                    * x[row, ramp((groups * _SUMS + v) * L, L)]
                )
            for s in T.unroll(1, _SUMS):
                squares[0, ramp(0, L)] = squares[0, ramp(0, L)] + squares[s, ramp(0, L)]
            total = T.alloc_buffer((1,), "float32")
            total[0] = hsum(squares[0, ramp(0, L)], L)
            for d in T.serial(D - vectors * L):
                total[0] = total[0] + x[row, vectors * L + d] * x[row, vectors * L + d]
            scale: T.let[T.float32] = vrsqrt(total[0] * T.float32(1.0 / D) + T.float32(eps), 1)
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
