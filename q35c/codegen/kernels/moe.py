"""Sparse mixture of experts: route, group rows by expert, two grouped products, combine.

    weights, ids = top_k(softmax(logits)), renormalised
    y[t] = residual[t] + sum_s weights[t, s] * down_e(silu(gate_e x[t]) * up_e x[t]) + sigmoid(gate[t]) * shared[t],
    e = ids[t, s]

A pair p = t * top_k + s is one token at one of its experts. Pairs are sorted by expert, so that each routed expert's
weights are read once and only routed experts are read at all; results are stored at the pair's own row, so the sum
over s has a fixed order. Threads split (active expert, block of 32 columns). One token: the limit is the bandwidth of
top_k experts. Many tokens: the FMA rate.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.common import (
    BLOCK,
    STACK,
    Expr,
    ceil_div,
    hmax,
    hmin_int,
    ramp,
    share,
    splat,
    splat_int,
    vexp,
    vsigmoid,
)
from q35c.codegen.kernels.tile import Matmul, Operands, sweep

_TAKEN = -3.0e38  # replaces a logit that was chosen; below any real one
_CHUNK = 64  # columns of one work item of combine


@T.inline
def choose_best(E, padded, L, x, chosen):
    """chosen = the index of the largest x, the lowest one on ties; always inside 0..E-1."""
    best = T.alloc_buffer((L,), "float32")
    place = T.alloc_buffer((L,), "int32")
    best[ramp(0, L)] = x[ramp(0, L)]
    for v in T.serial(1, padded // L):
        best[ramp(0, L)] = T.max(best[ramp(0, L)], x[ramp(v * L, L)])
    top: T.let[T.float32] = hmax(best[ramp(0, L)], L)
    place[ramp(0, L)] = splat_int(E - 1, L)
    for v in T.serial(padded // L):
        place[ramp(0, L)] = T.min(
            place[ramp(0, L)],
            T.Select(x[ramp(v * L, L)] == splat(top, L), T.ramp(v * L, 1, L), splat_int(E - 1, L)),
        )
    chosen[0] = hmin_int(place[ramp(0, L)], L)


def route(E: int, top_k: int, isa: Isa) -> PrimFunc:
    """Make the kernel (LOGITS f32 [T, E], IDS i32 [T, k], WEIGHTS f32 [T, k], T, ld_logits, tid, nt).

    The softmax's denominator cancels in the renormalisation. Ties take the lowest index.
    """
    L = isa.lanes
    padded = ceil_div(E, L) * L

    @T.prim_func(private=True, s_tir=True)
    def route_kernel(
        LOGITS: T.handle("float32"),
        IDS: T.handle("int32"),
        WEIGHTS: T.handle("float32"),
        tokens: T.int64,
        ld_logits: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        logits = T.decl_buffer((tokens, ld_logits), "float32", data=LOGITS)
        ids = T.decl_buffer((tokens, top_k), "int32", data=IDS)
        weights = T.decl_buffer((tokens, top_k), "float32", data=WEIGHTS)
        x = T.alloc_buffer((padded,), "float32", annotations=STACK)
        chosen = T.alloc_buffer((1,), "int32")
        sums = T.alloc_buffer((2,), "float32")  # the largest logit, the sum of weights
        first: T.let[T.int64] = share(tokens, tid, nt)
        for item in T.serial(share(tokens, tid + 1, nt) - first):
            row: T.let[T.int64] = first + item
            for e in T.serial(E):
                x[e] = logits[row, e]
            for e in T.serial(padded - E):
                x[E + e] = T.float32(_TAKEN)
            sums[1] = T.float32(0)
            for s in T.serial(top_k):
                choose_best(E, padded, L, x, chosen)
                if s == 0:
                    sums[0] = x[chosen[0]]
                weight: T.let[T.float32] = vexp(x[chosen[0]] - sums[0], 1)
                ids[row, s] = chosen[0]
                weights[row, s] = weight
                sums[1] = sums[1] + weight
                x[chosen[0]] = T.float32(_TAKEN)
            for s in T.serial(top_k):
                weights[row, s] = weights[row, s] / sums[1]
        return T.int32(0)

    return route_kernel


def group_by_expert(E: int, top_k: int) -> PrimFunc:
    """Make the kernel (IDS i32 [T, k], ORDER i32 [T * k], ACTIVE i32 [E], OFFSETS i32 [E + 1], COUNT i32 [1], T, tid, nt).

    A stable counting sort: ORDER holds pairs by expert; the a-th active expert owns OFFSETS[a]..OFFSETS[a + 1].
    Thread 0 works alone: 10 ns a pair.
    """

    @T.prim_func(private=True, s_tir=True)
    def group_by_expert_kernel(
        IDS: T.handle("int32"),
        ORDER: T.handle("int32"),
        ACTIVE: T.handle("int32"),
        OFFSETS: T.handle("int32"),
        COUNT: T.handle("int32"),
        tokens: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        ids = T.decl_buffer((tokens * top_k,), "int32", data=IDS)
        order = T.decl_buffer((tokens * top_k,), "int32", data=ORDER)
        active = T.decl_buffer((E,), "int32", data=ACTIVE)
        offsets = T.decl_buffer((E + 1,), "int32", data=OFFSETS)
        count = T.decl_buffer((1,), "int32", data=COUNT)
        place = T.alloc_buffer((E,), "int32", annotations=STACK)
        sums = T.alloc_buffer((2,), "int32")  # active experts, pairs so far
        if tid == 0:
            for e in T.serial(E):
                place[e] = 0
            for p in T.serial(tokens * top_k):
                place[ids[p]] = place[ids[p]] + 1
            sums[0] = 0
            sums[1] = 0
            for e in T.serial(E):
                rows: T.let[T.int32] = place[e]
                place[e] = sums[1]
                if rows > 0:
                    active[sums[0]] = T.cast(e, "int32")
                    offsets[sums[0]] = sums[1]
                    sums[0] = sums[0] + 1
                    sums[1] = sums[1] + rows
            offsets[sums[0]] = sums[1]
            count[0] = sums[0]
            for p in T.serial(tokens * top_k):
                slot: T.let[T.int32] = place[ids[p]]
                order[slot] = T.cast(p, "int32")
                place[ids[p]] = slot + 1
        return T.int32(0)

    return group_by_expert_kernel


def expert_gate_up(E: int, I: int, H: int, top_k: int, dtype: str, isa: Isa) -> PrimFunc:  # noqa: E741
    """Make the kernel (W, X f32 [T, H], ORDER, ACTIVE, OFFSETS, COUNT, Y f32 [T * k, I], T, ld_x, tid, nt)."""
    matmul = Matmul(2 * I, H, dtype, "swiglu", isa)

    @T.prim_func(private=True, s_tir=True)
    def expert_gate_up_kernel(
        W: T.handle(matmul.element),
        X: T.handle("float32"),
        ORDER: T.handle("int32"),
        ACTIVE: T.handle("int32"),
        OFFSETS: T.handle("int32"),
        COUNT: T.handle("int32"),
        Y: T.handle("float32"),
        tokens: T.int64,
        ld_x: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        w = T.decl_buffer((T.int64(E * matmul.blocks), matmul.lines, BLOCK), matmul.element, data=W)
        x = T.decl_buffer((tokens, ld_x), "float32", data=X)
        order = T.decl_buffer((tokens * top_k,), "int32", data=ORDER)
        active = T.decl_buffer((E,), "int32", data=ACTIVE)
        offsets = T.decl_buffer((E + 1,), "int32", data=OFFSETS)
        count = T.decl_buffer((1,), "int32", data=COUNT)
        y = T.decl_buffer((tokens * top_k, I), "float32", data=Y)
        _grouped(matmul, w, x, y, order, active, offsets, count, top_k, tid, nt)
        return T.int32(0)

    return expert_gate_up_kernel


def expert_down(E: int, I: int, H: int, top_k: int, dtype: str, isa: Isa) -> PrimFunc:  # noqa: E741
    """Make the kernel (W, X f32 [T * k, I], ORDER, ACTIVE, OFFSETS, COUNT, Y f32 [T * k, H], T, tid, nt)."""
    matmul = Matmul(H, I, dtype, "none", isa)

    @T.prim_func(private=True, s_tir=True)
    def expert_down_kernel(
        W: T.handle(matmul.element),
        X: T.handle("float32"),
        ORDER: T.handle("int32"),
        ACTIVE: T.handle("int32"),
        OFFSETS: T.handle("int32"),
        COUNT: T.handle("int32"),
        Y: T.handle("float32"),
        tokens: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        w = T.decl_buffer((T.int64(E * matmul.blocks), matmul.lines, BLOCK), matmul.element, data=W)
        x = T.decl_buffer((tokens * top_k, I), "float32", data=X)
        order = T.decl_buffer((tokens * top_k,), "int32", data=ORDER)
        active = T.decl_buffer((E,), "int32", data=ACTIVE)
        offsets = T.decl_buffer((E + 1,), "int32", data=OFFSETS)
        count = T.decl_buffer((1,), "int32", data=COUNT)
        y = T.decl_buffer((tokens * top_k, H), "float32", data=Y)
        _grouped(matmul, w, x, y, order, active, offsets, count, 1, tid, nt)
        return T.int32(0)

    return expert_down_kernel


def _grouped(
    matmul: Matmul, w: Expr, x: Expr, y: Expr, order: Expr, active: Expr, offsets: Expr, count: Expr,
    pairs_per_row: int, tid: Expr, nt: Expr,
) -> None:  # fmt: skip
    """Emit this thread's share of (active expert, block); pair p reads row p // pairs_per_row of x."""
    items = T.Bind(T.cast(count[0], "int64") * matmul.blocks)
    first = T.Bind(share(items, tid, nt))
    last = T.Bind(share(items, tid + 1, nt))
    with T.serial(last - first) as item:
        group = T.Bind(T.truncdiv(first + item, T.int64(matmul.blocks)))
        block = T.Bind(first + item - group * matmul.blocks)
        # int64: an expert's first element lies beyond 2^31 in the larger models.
        expert = T.Bind(T.cast(active[group], "int64"))
        operands = Operands(
            w, x, y, y, expert * matmul.blocks + block, block,
            lambda position: T.cast(T.truncdiv(order[position], pairs_per_row), "int64"),
            lambda position: T.cast(order[position], "int64"),
        )  # fmt: skip
        begin = T.Bind(T.cast(offsets[group], "int64"))
        end = T.Bind(T.cast(offsets[group + 1], "int64"))
        sweep(matmul, operands, begin, end)


def combine(H: int, top_k: int, isa: Isa) -> PrimFunc:
    """Make the kernel (PARTS f32 [T * k, H], WEIGHTS f32 [T, k], SHARED, GATE f32 [T, 1], RESIDUAL, Y f32 [T, H], T,
    ld_shared, ld_gate, ld_residual, ld_y, tid, nt). Y may be RESIDUAL.
    """
    L, chunks = isa.lanes, ceil_div(H, _CHUNK)

    @T.prim_func(private=True, s_tir=True)
    def combine_kernel(
        PARTS: T.handle("float32"),
        WEIGHTS: T.handle("float32"),
        SHARED: T.handle("float32"),
        GATE: T.handle("float32"),
        RESIDUAL: T.handle("float32"),
        Y: T.handle("float32"),
        tokens: T.int64,
        ld_shared: T.int64,
        ld_gate: T.int64,
        ld_residual: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        # No noalias: Y may be RESIDUAL.
        parts = T.decl_buffer((tokens * top_k, H), "float32", data=PARTS)
        weights = T.decl_buffer((tokens, top_k), "float32", data=WEIGHTS)
        shared = T.decl_buffer((tokens, ld_shared), "float32", data=SHARED)
        gate = T.decl_buffer((tokens, ld_gate), "float32", data=GATE)
        residual = T.decl_buffer((tokens, ld_residual), "float32", data=RESIDUAL)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        first: T.let[T.int64] = share(tokens * chunks, tid, nt)
        for item in T.serial(share(tokens * chunks, tid + 1, nt) - first):
            row: T.let[T.int64] = T.truncdiv(first + item, T.int64(chunks))
            begin: T.let[T.int64] = (first + item - row * chunks) * _CHUNK
            width: T.let[T.int64] = T.min(T.int64(_CHUNK), H - begin)
            open_: T.let[T.float32] = vsigmoid(gate[row, 0], 1)
            whole: T.let[T.int64] = T.truncdiv(width, T.int64(L))
            sum_ = T.alloc_buffer((L,), "float32")
            for v in T.serial(whole):
                sum_[ramp(0, L)] = (
                    residual[row, ramp(begin + v * L, L)]
                    + shared[row, ramp(begin + v * L, L)] * splat(open_, L)
                )
                for s in T.serial(top_k):
                    sum_[ramp(0, L)] = sum_[ramp(0, L)] + parts[
                        row * top_k + s, ramp(begin + v * L, L)
                    ] * splat(weights[row, s], L)
                y[row, ramp(begin + v * L, L)] = sum_[ramp(0, L)]
            for c in T.serial(width - whole * L):
                column: T.let[T.int64] = begin + whole * L + c
                sum_[0] = residual[row, column] + shared[row, column] * open_
                for s in T.serial(top_k):
                    sum_[0] = sum_[0] + parts[row * top_k + s, column] * weights[row, s]
                y[row, column] = sum_[0]
        return T.int32(0)

    return combine_kernel
