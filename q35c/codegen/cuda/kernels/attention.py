"""Gated attention over the cache: norm, rotation and write of new cells, then attention with an online softmax.

    q = rotate(q * rsqrt(mean(q^2) + eps) * (1 + w)) * scale;   k likewise without scale, rounded to the cache's type
    y[t, h] = sigmoid(gate[t, h]) * sum_c softmax_c(q[t, h] . k[c]) v[c]                      c <= position of t

In attention a block has a token and a query head; its warps take blocks of 32 cells in turn, a lane a cell for the keys and
a dim for the values, and meet in shared memory. With `splits` the cells of a head are shared by so many blocks, whose sums
`attention_combine` adds. The limit is the bandwidth of the cache.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost
from q35c.codegen.cuda.kernels.cache import Cache
from q35c.codegen.cuda.kernels.family import (
    EXP_OPERATIONS,
    F32_BYTES,
    ONE,
    WARP,
    Family,
    Grid,
    Parameters,
    ceil_div,
    elementwise,
    fixed,
    per_row,
)
from q35c.codegen.cuda.kernels.make import (
    Expr,
    T,
    add,
    array,
    let,
    local,
    make_kernel,
    shared,
    store,
)
from q35c.codegen.cuda.kernels.threads import (
    barrier,
    columns,
    shuffle,
    sigmoid,
    threads,
    warp_max,
    warp_sum,
    when,
)
from q35c.layouts.cache import CELLS

WARPS = 4
LEAST = -1e30  # a maximum of nothing: its exponential beside any other is 0
HUGE = 1 << 40  # elements behind a state's pointer; what a sequence has is the runtime's to know


def cache_of(p: Parameters) -> Cache:
    """Return the cache that a kernel's parameters describe."""
    return Cache(p["D"], p["kv_dtype"], p["context"], p["v_offset_bytes"])


# --- norm, rotation, write ------------------------------------------------------------------------

_PREPARE = (
    "state slots starts qg k v table q_out q_norm k_norm tokens ld_qg ld_k ld_v ld_table ld_q_out"
)


def attention_prepare(
    Hq: int, Hkv: int, D: int, R: int, kv_dtype: str, context: int, rows: str, v_offset_bytes: int, eps: float, scale: float
) -> PrimFunc:  # fmt: skip
    """Make the kernel (STATE, SLOTS i64 [B], STARTS i32 [B], QG f32 [T, Hq, 2 D], K, V [T, Hkv, D], TABLE [T, R], Q_OUT
    [T, Hq, D], Q_NORM, K_NORM [D], T, ld_..).

    A warp does a head of a row: `rows` is batch, where row b is of sequence b, or sequence. Cells are written at STARTS and on.
    """
    cache = Cache(D, kv_dtype, context, v_offset_bytes)
    heads, half = Hq + 2 * Hkv, R // 2

    def body(  # type: ignore[no-untyped-def]
        state, slots, starts, qg, k, v, table, q_out, q_norm, k_norm, tokens, ld_qg, ld_k, ld_v, ld_table, ld_q_out
    ) -> None:  # fmt: skip
        state = array(state, (HUGE,), cache.element)
        slots, starts = array(slots, (tokens,), "int64"), array(starts, (tokens,), "int32")
        qg, k, v = (
            array(x, (tokens, ld), "float32") for x, ld in ((qg, ld_qg), (k, ld_k), (v, ld_v))
        )
        table = array(table, (tokens, ld_table), "float32")
        q_out = array(q_out, (tokens, ld_q_out), "float32")
        q_norm, k_norm = array(q_norm, (D,), "float32"), array(k_norm, (D,), "float32")

        def rotated(x: Expr, row: Expr, first: Expr, weight: Expr, d: Expr, factor: Expr) -> Expr:
            """Return dim d of a normalised and rotated head that begins at x[row, first]."""

            def normed(at: Expr) -> Expr:
                return x[row, first + at] * factor * (T.float32(1) + weight[at])

            if R == 0:
                return normed(d)
            angle = let("angle", d % half)
            other = let("other", T.Select(d < half, d + half, d - half))
            sign = T.Select(d < half, T.float32(-1), T.float32(1))
            cosine, sine = table[row, angle], table[row, half + angle]
            turned = normed(d) * cosine + sign * normed(other) * sine
            return T.if_then_else(d < R, turned, normed(d))

        def factor_of(x: Expr, row: Expr, first: Expr, lane: Expr) -> Expr:
            total = local("total", (1,))
            store(total, T.float32(0), 0)
            with columns(D, lane, WARP) as d:
                add(total, x[row, first + d] * x[row, first + d], 0)
            warp_sum(total)
            return let("factor", T.rsqrt(total[0] * T.float32(1.0 / D) + T.float32(eps)))

        grid = (ceil_div(heads, WARPS), tokens, 1)
        with threads(grid, (WARP, WARPS, 1)) as (bx, row, lane, warp):
            head = let("head", bx * WARPS + warp)
            sequence = row if rows == "batch" else 0
            base = cache.base(slots[sequence])
            cell = let("cell", starts[sequence] + (0 if rows == "batch" else row))
            with when(head < Hq):
                factor = factor_of(qg, row, head * (2 * D), lane)
                with columns(D, lane, WARP) as d:
                    value = rotated(qg, row, head * (2 * D), q_norm, d, factor) * T.float32(scale)
                    store(q_out, value, row, head * D + d)
            with when(head >= Hq, head < Hq + Hkv):
                number = let("number", head - Hq)
                factor = factor_of(k, row, number * D, lane)
                with columns(D, lane, WARP) as d:
                    value = let("value", rotated(k, row, number * D, k_norm, d, factor))
                    at = cache.key(base, number, cell // CELLS, d, cell % CELLS)
                    cache.write(state, at, value)
            with when(head >= Hq + Hkv, head < heads):
                number = let("number", head - (Hq + Hkv))
                with columns(D, lane, WARP) as d:
                    at = cache.value(base, number, cell, d)
                    cache.write(state, at, v[row, number * D + d])

    names = ("qg", "k", "v", "table", "q_out", "q_norm", "k_norm")
    types = {"state": cache.element, "slots": "int64", "starts": "int32"}
    return make_kernel(_PREPARE, types | dict.fromkeys(names, "float32"), body)


def _prepare_cost(p: Parameters) -> Cost:
    heads = p["Hq"] + p["Hkv"]
    written = 2 * p["Hkv"] * p["D"] * cache_of(p).element_bytes
    words = p["D"] * (3 * p["Hq"] + 2 * p["Hkv"]) + p["R"]
    return Cost(
        bytes_per_token=written,
        cached_bytes_per_token=words * F32_BYTES,
        operations_per_token=8 * heads * p["D"],
    )


ATTENTION_PREPARE = Family(
    attention_prepare,
    _PREPARE,
    writes="state q_out",
    cost=_prepare_cost,
    grid=lambda p: (fixed(ceil_div(p["Hq"] + 2 * p["Hkv"], WARPS)), per_row(), ONE),
)


# --- attention ------------------------------------------------------------------------------------

_WHOLE = "state slots starts q qg y tokens ld_q ld_qg ld_y"
_SPLIT = "state slots starts q parts tokens ld_q"
PART_EXTRA = 2  # words of a part beside its sums: their maximum, and their total weight


def attention(
    Hq: int, Hkv: int, D: int, kv_dtype: str, context: int, rows: str, v_offset_bytes: int, splits: int
) -> PrimFunc:  # fmt: skip
    """Make the kernel (STATE, SLOTS, STARTS, Q f32 [T, Hq, D], QG [T, Hq, 2 D], Y [T, Hq, D], T, ld_..).

    With more than one of `splits`: (STATE, SLOTS, STARTS, Q, PARTS f32 [T, Hq, splits, D + 2], T, ld_q).
    """
    cache = Cache(D, kv_dtype, context, v_offset_bytes)
    mine = ceil_div(D, WARP)  # dims of a lane

    def body(state, slots, starts, q, tokens, ld_q, qg: Any = None, y=None, ld_qg: Any = None, ld_y=None, parts=None) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
        state = array(state, (HUGE,), cache.element)
        slots, starts = array(slots, (tokens,), "int64"), array(starts, (tokens,), "int32")
        q = array(q, (tokens, ld_q), "float32")
        if parts is None:
            qg, y = array(qg, (tokens, ld_qg), "float32"), array(y, (tokens, ld_y), "float32")
        else:
            parts = array(parts, (tokens, Hq, splits, D + PART_EXTRA), "float32")
        with threads((Hq, tokens, splits), (WARP, WARPS, 1)) as bound:
            head, row, *_, lane, warp = bound
            split = bound[2] if splits > 1 else 0
            largest, weight, acc = (
                local("largest", (1,)),
                local("weight", (1,)),
                local("acc", (mine,)),
            )
            query = shared("query", (D,))
            all_largest, all_weight = (
                shared("all_largest", (WARPS,)),
                shared("all_weight", (WARPS,)),
            )
            sums = shared("sums", (WARPS, D))
            sequence = row if rows == "batch" else 0
            base = cache.base(slots[sequence])
            count = let("count", starts[sequence] + 1 + (0 if rows == "batch" else row))
            kv_head = let("kv_head", head // (Hq // Hkv))
            thread = let("thread", warp * WARP + lane)
            with columns(D, thread, WARPS * WARP) as d:
                store(query, q[row, head * D + d], d)
            store(largest, T.float32(LEAST), 0)
            store(weight, T.float32(0), 0)
            for i in range(mine):
                store(acc, T.float32(0), i)
            barrier()
            blocks = let("blocks", (count + (CELLS - 1)) // CELLS)
            first, step = let("first", split * WARPS + warp), splits * WARPS
            with T.serial((blocks - first + (step - 1)) // step) as turn:
                block = let("block", first + turn * step)
                used = let("used", T.min(count - block * CELLS, CELLS))
                score = local("score", (1,))
                store(score, T.float32(0), 0)
                with T.serial(D) as d:
                    at = cache.key(base, kv_head, block, d, T.min(lane, used - 1))
                    add(score, query[d] * cache.load(state, at), 0)
                top = local("top", (1,))
                store(top, T.Select(lane < used, score[0], T.float32(LEAST)), 0)
                warp_max(top)
                now = let("now", T.max(largest[0], top[0]))
                shrink = let("shrink", T.exp(largest[0] - now))
                store(score, T.Select(lane < used, T.exp(score[0] - now), T.float32(0)), 0)
                total = local("total", (1,))
                store(total, score[0], 0)
                warp_sum(total)
                store(weight, weight[0] * shrink + total[0], 0)
                store(largest, now, 0)
                for i in range(mine):
                    store(acc, acc[i] * shrink, i)
                with T.serial(used) as cell:
                    share = let("share", shuffle(score[0], cell))
                    with columns(D, lane, WARP) as d:
                        at = cache.value(base, kv_head, block * CELLS + cell, d)
                        value = cache.load(state, at)
                        add(acc, share * value, d // WARP)
            with columns(D, lane, WARP) as d:
                store(sums, acc[d // WARP], warp, d)
            with when(lane == 0):
                store(all_largest, largest[0], warp)
                store(all_weight, weight[0], warp)
            barrier()
            top, factors, weights = (
                local("top", (1,)),
                local("factors", (WARPS,)),
                local("weights", (1,)),
            )
            store(top, T.float32(LEAST), 0)
            store(weights, T.float32(0), 0)
            for w in range(WARPS):
                store(top, T.max(top[0], all_largest[w]), 0)
            for w in range(WARPS):
                store(factors, T.exp(all_largest[w] - top[0]), w)
                add(weights, all_weight[w] * factors[w], 0)
            with columns(D, thread, WARPS * WARP) as d:
                total = sums[0, d] * factors[0]
                for w in range(1, WARPS):
                    total = total + sums[w, d] * factors[w]
                if parts is None:
                    gate = sigmoid(qg[row, head * (2 * D) + D + d])
                    store(y, total / weights[0] * gate, row, head * D + d)
                else:
                    store(parts, total, row, head, split, d)
            if parts is not None:
                with when(thread == 0):
                    store(parts, top[0], row, head, split, D)
                    store(parts, weights[0], row, head, split, D + 1)

    types = {"state": cache.element, "slots": "int64", "starts": "int32"}
    types |= dict.fromkeys(("q", "qg", "y", "parts"), "float32")
    return make_kernel(_attention_arguments({"splits": splits}), types, body)


def _attention_arguments(p: Parameters) -> str:
    return _WHOLE if p["splits"] == 1 else _SPLIT


def _attention_cost(p: Parameters) -> Cost:
    size = p["Hq"] * p["D"]
    return Cost(
        bytes_per_cell=2 * p["Hkv"] * p["D"] * cache_of(p).element_bytes,
        cached_bytes_per_token=3 * size * F32_BYTES,
        operations_per_score=4 * size + EXP_OPERATIONS * p["Hq"],
    )


def _attention_grid(p: Parameters) -> Grid:
    return fixed(p["Hq"]), per_row(), fixed(p["splits"])


ATTENTION = Family(
    attention, _attention_arguments, writes="y parts", cost=_attention_cost, grid=_attention_grid
)

_COMBINE = "parts qg y tokens ld_qg ld_y"


def attention_combine(Hq: int, D: int, splits: int) -> PrimFunc:
    """Make the kernel (PARTS f32 [T, Hq, splits, D + 2], QG [T, Hq, 2 D], Y [T, Hq, D], T, ld_qg, ld_y)."""

    def body(parts, qg, y, tokens, ld_qg, ld_y) -> None:  # type: ignore[no-untyped-def]
        parts = array(parts, (tokens, Hq, splits, D + PART_EXTRA), "float32")
        qg, y = array(qg, (tokens, ld_qg), "float32"), array(y, (tokens, ld_y), "float32")
        with threads((Hq, tokens, 1), (WARPS * WARP, 1, 1)) as (head, row, t):
            top, weight = local("top", (1,)), local("weight", (1,))
            total, factor = local("total", (1,)), local("factor", (1,))
            store(top, T.float32(LEAST), 0)
            with T.serial(splits) as part:
                store(top, T.max(top[0], parts[row, head, part, D]), 0)
            with columns(D, t, WARPS * WARP) as d:
                store(weight, T.float32(0), 0)
                store(total, T.float32(0), 0)
                with T.serial(splits) as part:
                    store(factor, T.exp(parts[row, head, part, D] - top[0]), 0)
                    add(weight, parts[row, head, part, D + 1] * factor[0], 0)
                    add(total, parts[row, head, part, d] * factor[0], 0)
                gate = sigmoid(qg[row, head * (2 * D) + D + d])
                store(y, total[0] / weight[0] * gate, row, head * D + d)

    return make_kernel(_COMBINE, dict.fromkeys(("parts", "qg", "y"), "float32"), body)


ATTENTION_COMBINE = Family(
    attention_combine,
    _COMBINE,
    writes="y",
    cost=lambda p: elementwise(
        p["Hq"] * p["D"] * (p["splits"] + 2), 4 * p["Hq"] * p["D"] * p["splits"]
    ),
    grid=lambda p: (fixed(p["Hq"]), per_row(), ONE),
)
