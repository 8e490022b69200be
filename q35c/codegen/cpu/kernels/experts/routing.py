"""Sparse mixture of experts: five kernels with a barrier between each two.

    route           ids, weights of the top_k experts of each token, softmax renormalised over them
    group_by_expert pairs (token, choice) sorted by expert
    expert_gate_up  y1[p] = silu(gate_e x[p // top_k]) * up_e x[p // top_k]     for pair p of expert e
    expert_down     y2[p] = down_e y1[p]
    combine         y = residual + sum_s weight_s y2[s] + sigmoid(shared gate) * shared

A shared expert of the others' size is one of them: its weights lie behind theirs, and `route` chooses it last for every
token, with sigmoid(shared gate) as its weight. Then `combine` has no other, and all experts share every region.

A pair is numbered token * top_k + choice, and results stay at the pair's row: no kernel scatters
sums. The two products are in products.py. Sorting is done by one thread: 2 us for 512 pairs.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.family import Family, Parameters, elementwise
from q35c.codegen.cpu.kernels.vectors import (
    STACK,
    Expr,
    hmax,
    hmin_int,
    ramp,
    share,
    splat,
    splat_int,
    vexp,
    vsigmoid,
)
from q35c.layouts.weights import ceil_div

_COLUMNS = 64  # columns of one work item of combine


def route(E: int, top_k: int, isa: Isa, has_shared: bool = False) -> PrimFunc:
    """Make the kernel (LOGITS f32 [T, E], GATE [T, 1], IDS i32 [T, k], WEIGHTS f32 [T, k], T, ld_logits, ld_gate, tid, nt).

    Softmax over all experts, the top_k largest in falling order (of equals the lowest id), divided
    by their sum; k is top_k. With `has_shared` k is one more, expert E with weight sigmoid(GATE); else GATE is not read.
    Ids are valid whatever the logits are. Threads split the tokens.
    """
    L, choices = isa.lanes, top_k + has_shared
    vectors = ceil_div(E, L)

    @T.prim_func(private=True, s_tir=True)
    def route_kernel(
        LOGITS: T.handle("float32"),
        GATE: T.handle("float32"),
        IDS: T.handle("int32"),
        WEIGHTS: T.handle("float32"),
        tokens: T.int64,
        ld_logits: T.int64,
        ld_gate: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        logits = T.decl_buffer((tokens, ld_logits), "float32", data=LOGITS)
        gate = T.decl_buffer((tokens, ld_gate), "float32", data=GATE)
        ids = T.decl_buffer((tokens, choices), "int32", data=IDS)
        weights = T.decl_buffer((tokens, choices), "float32", data=WEIGHTS)
        first: T.let[T.int64] = share(tokens, tid, nt)
        last: T.let[T.int64] = share(tokens, tid + 1, nt)
        scores = T.alloc_buffer((vectors * L,), "float32", annotations=STACK)
        largest = T.alloc_buffer((L,), "float32")
        lowest = T.alloc_buffer((L,), "int32")
        total = T.alloc_buffer((1,), "float32")
        top = T.alloc_buffer((1,), "float32")
        for item in T.serial(last - first):
            row: T.let[T.int64] = first + item
            scores[ramp((vectors - 1) * L, L)] = splat(float("-inf"), L)
            for e in T.serial(E):
                scores[e] = logits[row, e]
            total[0] = T.float32(0)
            for choice in T.serial(top_k):
                largest[ramp(0, L)] = scores[ramp(0, L)]
                for v in T.serial(vectors - 1):
                    largest[ramp(0, L)] = T.max(largest[ramp(0, L)], scores[ramp((v + 1) * L, L)])
                best: T.let[T.float32] = hmax(largest[ramp(0, L)], L)
                lowest[ramp(0, L)] = splat_int(E - 1, L)
                for v in T.serial(vectors):
                    lowest[ramp(0, L)] = T.min(
                        lowest[ramp(0, L)],
                        T.Select(
                            scores[ramp(v * L, L)] == splat(best, L),
                            ramp(v * L, L),
                            splat_int(E - 1, L),
                        ),
                    )
                expert: T.let[T.int32] = hmin_int(lowest[ramp(0, L)], L)
                if choice == 0:
                    top[0] = best
                scores[expert] = T.float32(float("-inf"))
                ids[row, choice] = expert
                weights[row, choice] = vexp(best - top[0], 1)
                total[0] = total[0] + weights[row, choice]
            for choice in T.serial(top_k):
                weights[row, choice] = weights[row, choice] / total[0]
            if has_shared:
                ids[row, top_k] = T.int32(E)
                weights[row, top_k] = vsigmoid(gate[row, 0], 1)
        return T.int32(0)

    return route_kernel


def group_by_expert(E: int, top_k: int) -> PrimFunc:
    """Make the kernel (IDS i32 [T, k], ORDER i32 [T*k], ACTIVE i32 [E], OFFSETS i32 [E + 1],
    COUNT i32 [1], T, tid, nt).

    ACTIVE lists the COUNT experts that have pairs, ascending; the pairs of ACTIVE[a] are
    ORDER[OFFSETS[a]:OFFSETS[a + 1]], ascending. ACTIVE and OFFSETS hold nothing beyond. Thread 0 works.
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
        if tid == 0:
            places = T.alloc_buffer((E,), "int32", annotations=STACK)  # counts, then next places
            used = T.alloc_buffer((1,), "int32")
            begin = T.alloc_buffer((1,), "int32")
            for e in T.serial(E):
                places[e] = T.int32(0)
            for p in T.serial(tokens * top_k):
                places[ids[p]] = places[ids[p]] + 1
            used[0] = T.int32(0)
            begin[0] = T.int32(0)
            for e in T.serial(E):
                pairs: T.let[T.int32] = places[e]
                if pairs > 0:
                    active[used[0]] = e
                    offsets[used[0]] = begin[0]
                    places[e] = begin[0]
                    begin[0] = begin[0] + pairs
                    used[0] = used[0] + 1
            offsets[used[0]] = begin[0]
            count[0] = used[0]
            for p in T.serial(tokens * top_k):
                order[places[ids[p]]] = T.cast(p, "int32")
                places[ids[p]] = places[ids[p]] + 1
        return T.int32(0)

    return group_by_expert_kernel


def combine(H: int, top_k: int, isa: Isa, has_shared: bool = True) -> PrimFunc:
    """Make the kernel (Y2 f32 [T*k, H], WEIGHTS f32 [T, k], SHARED [T, H], GATE [T, 1], RESIDUAL [T, H],
    Y [T, H], T, ld_shared, ld_gate, ld_residual, ld_y, tid, nt).

    Y may be RESIDUAL itself. Without `has_shared` SHARED and GATE are not read. Threads split (token, 64 columns) items.
    """
    L = isa.lanes
    chunks = ceil_div(H, _COLUMNS)

    @T.prim_func(private=True, s_tir=True)
    def combine_kernel(
        Y2: T.handle("float32"),
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
        y2 = T.decl_buffer((tokens * top_k, H), "float32", data=Y2)
        weights = T.decl_buffer((tokens, top_k), "float32", data=WEIGHTS)
        shared = T.decl_buffer((tokens, ld_shared), "float32", data=SHARED)
        gates = T.decl_buffer((tokens, ld_gate), "float32", data=GATE)
        residual = T.decl_buffer((tokens, ld_residual), "float32", data=RESIDUAL)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        first: T.let[T.int64] = share(tokens * chunks, tid, nt)
        last: T.let[T.int64] = share(tokens * chunks, tid + 1, nt)
        for item in T.serial(last - first):
            row: T.let[T.int64] = T.truncdiv(first + item, chunks)
            begin: T.let[T.int64] = T.truncmod(first + item, chunks) * _COLUMNS
            width: T.let[T.int64] = T.min(T.int64(_COLUMNS), H - begin)
            gate: T.let[T.float32] = vsigmoid(gates[row, 0], 1) if has_shared else T.float32(0)
            for v in T.serial(T.truncdiv(width, L)):
                y[row, ramp(begin + v * L, L)] = _combined(
                    (y2, weights, shared if has_shared else None, residual),
                    row,
                    begin + v * L,
                    gate,
                    top_k,
                    L,
                )
            for c in T.serial(T.truncmod(width, L)):
                y[row, begin + T.truncdiv(width, L) * L + c] = _combined(
                    (y2, weights, shared if has_shared else None, residual),
                    row,
                    begin + T.truncdiv(width, L) * L + c,
                    gate,
                    top_k,
                    1,
                )
        return T.int32(0)

    return combine_kernel


def _combined(
    buffers: tuple[Expr, Expr, Expr | None, Expr],
    row: Expr,
    column: Expr,
    gate: Expr,
    top_k: int,
    lanes: int,
) -> Expr:
    """Return `lanes` columns of a combined row."""
    y2, weights, shared, residual = buffers
    columns = ramp(column, lanes)
    total = residual[row, columns]
    if shared is not None:
        total = total + shared[row, columns] * splat(gate, lanes)
    for s in range(top_k):
        total = total + y2[row * top_k + s, columns] * splat(weights[row, s], lanes)
    return total


def _combine_cost(p: Parameters) -> Cost:
    terms = p["top_k"] + p.get("has_shared", True)
    return elementwise((terms + 2) * p["H"], (2 * terms + 2) * p["H"])


ROUTE = Family(
    route,
    "logits gate ids weights tokens ld_logits ld_gate",
    writes="ids weights",
    cost=lambda p: elementwise(p["E"] + 2 * p["top_k"], 2 * p["E"] * p["top_k"]),
)
GROUP_BY_EXPERT = Family(
    group_by_expert,
    "ids order active offsets count tokens",
    writes="order active offsets count",
    cost=lambda p: elementwise(2 * p["top_k"], 4 * p["top_k"]),
    takes_isa=False,
)
COMBINE = Family(
    combine,
    "y2 weights shared gate residual y tokens ld_shared ld_gate ld_residual ld_y",
    writes="y",
    cost=_combine_cost,
)
