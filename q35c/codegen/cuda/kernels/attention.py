"""Gated attention over the cache: norm, rotation and write of new cells, then attention with an online softmax.

    q = rotate(q * rsqrt(mean(q^2) + eps) * (1 + w)) * scale;   k likewise without scale, rounded to the cache's type
    y[t, h] = sigmoid(gate[t, h]) * sum_c softmax_c(q[t, h] . k[c]) v[c]                      c <= position of t

In attention a block has a token and a query head; its warps take blocks of 32 cells in turn, a lane a cell for the keys and
a dim for the values, and meet in shared memory. With `splits` the cells of a head are shared by so many blocks, whose sums
`attention_combine` adds. The limit is the bandwidth of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost
from q35c.codegen.cuda.kernels.cache import CACHES, CELL_BYTES
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
    cache = CACHES[kv_dtype](D, kv_dtype, context, v_offset_bytes)
    heads, half = Hq + 2 * Hkv, R // 2

    def body(  # type: ignore[no-untyped-def]
        slots, starts, qg, k, v, table, q_out, q_norm, k_norm, tokens, ld_qg, ld_k, ld_v, ld_table, ld_q_out, **state
    ) -> None:  # fmt: skip
        state = cache.bind(state)
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
                cache.write_key(
                    state,
                    base,
                    number,
                    cell,
                    lane,
                    lambda d: rotated(k, row, number * D, k_norm, d, factor),
                )
            with when(head >= Hq + Hkv, head < heads):
                number = let("number", head - (Hq + Hkv))
                cache.write_value(state, base, number, cell, lane, lambda d: v[row, number * D + d])

    names = ("qg", "k", "v", "table", "q_out", "q_norm", "k_norm")
    types = {**cache.types, "slots": "int64", "starts": "int32"} | dict.fromkeys(names, "float32")
    return make_kernel(_prepare_arguments({"kv_dtype": kv_dtype}), types, body)


def _prepare_arguments(p: Parameters) -> str:
    return f"{CACHES[p['kv_dtype']].pointers} {_PREPARE}"


def _prepare_cost(p: Parameters) -> Cost:
    heads = p["Hq"] + p["Hkv"]
    written = 2 * p["Hkv"] * CELL_BYTES[p["kv_dtype"]](p["D"])
    words = p["D"] * (3 * p["Hq"] + 2 * p["Hkv"]) + p["R"]
    return Cost(
        bytes_per_token=written,
        cached_bytes_per_token=words * F32_BYTES,
        operations_per_token=8 * heads * p["D"],
    )


ATTENTION_PREPARE = Family(
    attention_prepare,
    _prepare_arguments,
    writes="state scales q_out",
    cost=_prepare_cost,
    grid=lambda p: (fixed(ceil_div(p["Hq"] + 2 * p["Hkv"], WARPS)), per_row(), ONE),
)


# --- attention ------------------------------------------------------------------------------------

_WHOLE = "slots starts q qg y tokens ld_q ld_qg ld_y"
_SPLIT = "slots starts q parts tokens ld_q"
PART_EXTRA = 2  # words of a part beside its sums: their maximum, and their total weight


@dataclass(frozen=True)
class Softmax:
    """An online softmax of each warp: the largest score so far, the total weight, and the weighted sum of values by dim."""

    largest: Expr
    weight: Expr
    acc: Expr

    @staticmethod
    def make(D: int) -> Softmax:
        made = Softmax(
            local("largest", (1,)), local("weight", (1,)), local("acc", (ceil_div(D, WARP),))
        )
        store(made.largest, T.float32(LEAST), 0)
        store(made.weight, T.float32(0), 0)
        for i in range(ceil_div(D, WARP)):
            store(made.acc, T.float32(0), i)
        return made

    def shrink(self, top: Expr, D: int) -> Expr:
        """Let what was added count relative to a new largest score, which is returned."""
        now = let("now", T.max(self.largest[0], top))
        factor = let("shrink", T.exp(self.largest[0] - now))
        store(self.weight, self.weight[0] * factor, 0)
        store(self.largest, now, 0)
        for i in range(ceil_div(D, WARP)):
            store(self.acc, self.acc[i] * factor, i)
        return now


def attention(
    Hq: int, Hkv: int, D: int, kv_dtype: str, context: int, rows: str, v_offset_bytes: int, splits: int
) -> PrimFunc:  # fmt: skip
    """Make the kernel (STATE, SLOTS, STARTS, Q f32 [T, Hq, D], QG [T, Hq, 2 D], Y [T, Hq, D], T, ld_..).

    With more than one of `splits`: (STATE, SLOTS, STARTS, Q, PARTS f32 [T, Hq, splits, D + 2], T, ld_q).
    """
    cache = CACHES[kv_dtype](D, kv_dtype, context, v_offset_bytes)

    def body(slots, starts, q, tokens, ld_q, **others) -> None:  # type: ignore[no-untyped-def]
        state = cache.bind(others)
        slots, starts = array(slots, (tokens,), "int64"), array(starts, (tokens,), "int32")
        q = array(q, (tokens, ld_q), "float32")
        results = _results(others, tokens, Hq, D, splits)
        with threads((Hq, tokens, splits), (WARP, WARPS, 1)) as bound:
            head, row, *_, lane, warp = bound
            split = bound[2] if splits > 1 else 0
            query = shared("query", (D,))
            sequence = row if rows == "batch" else 0
            base = cache.base(slots[sequence])
            count = let("count", starts[sequence] + 1 + (0 if rows == "batch" else row))
            kv_head = let("kv_head", head // (Hq // Hkv))
            thread = let("thread", warp * WARP + lane)
            with columns(D, thread, WARPS * WARP) as d:
                store(query, q[row, head * D + d], d)
            softmax = Softmax.make(D)
            barrier()
            blocks = let("blocks", (count + (CELLS - 1)) // CELLS)
            first, step = let("first", split * WARPS + warp), splits * WARPS
            with T.serial((blocks - first + (step - 1)) // step) as turn:
                block = let("block", first + turn * step)
                used = let("used", T.min(count - block * CELLS, CELLS))
                _attend(cache, state, base, kv_head, block, used, query, lane, softmax)
            total, top, weight = _meet(softmax, D, lane, warp)
            with columns(D, thread, WARPS * WARP) as d:
                results.store(row, head, split, d, total(d), weight)
            results.store_sums(row, head, split, thread, top, weight)

    types = {**cache.types, "slots": "int64", "starts": "int32"}
    types |= dict.fromkeys(("q", "qg", "y", "parts"), "float32")
    return make_kernel(_attention_arguments({"splits": splits, "kv_dtype": kv_dtype}), types, body)


def _attend(cache, state, base, head, block, used, query, lane, softmax) -> None:  # type: ignore[no-untyped-def]
    """Attend to the first `used` of a block's cells: a lane has a cell of the keys, and dims of the values."""
    score, top, total = (local(name, (1,)) for name in ("score", "top", "total"))
    cell = let("cell", T.min(lane, used - 1))
    store(score, T.float32(0), 0)
    with T.serial(cache.D) as d:
        add(score, query[d] * cache.load(state, cache.key(base, head, block, d, cell)), 0)
    scaled = cache.scaled(state, "key", base, head, block, cell, score[0])
    store(top, T.Select(lane < used, scaled, T.float32(LEAST)), 0)
    store(score, top[0], 0)
    warp_max(top)
    now = softmax.shrink(top[0], cache.D)
    store(score, T.Select(lane < used, T.exp(score[0] - now), T.float32(0)), 0)
    store(total, score[0], 0)
    warp_sum(total)
    add(softmax.weight, total[0], 0)
    store(score, cache.scaled(state, "value", base, head, block, cell, score[0]), 0)
    with T.serial(used) as other:
        share = let("share", shuffle(score[0], other))
        with columns(cache.D, lane, WARP) as d:
            value = cache.load(state, cache.value(base, head, block, d, other))
            add(softmax.acc, share * value, d // WARP)


def _meet(softmax: Softmax, D: int, lane: Expr, warp: Expr) -> tuple[Callable[[Expr], Expr], Expr, Expr]:  # fmt: skip
    """Add up what the warps have; return the sum of values by dim, the largest score and the total weight."""
    all_largest, all_weight = shared("all_largest", (WARPS,)), shared("all_weight", (WARPS,))
    sums = shared("sums", (WARPS, D))
    with columns(D, lane, WARP) as d:
        store(sums, softmax.acc[d // WARP], warp, d)
    with when(lane == 0):
        store(all_largest, softmax.largest[0], warp)
        store(all_weight, softmax.weight[0], warp)
    barrier()
    top, weight, factors = local("most", (1,)), local("weights", (1,)), local("factors", (WARPS,))
    store(top, T.float32(LEAST), 0)
    store(weight, T.float32(0), 0)
    for w in range(WARPS):
        store(top, T.max(top[0], all_largest[w]), 0)
    for w in range(WARPS):
        store(factors, T.exp(all_largest[w] - top[0]), w)
        add(weight, all_weight[w] * factors[w], 0)

    def total(d: Expr) -> Expr:
        result = sums[0, d] * factors[0]
        for w in range(1, WARPS):
            result = result + sums[w, d] * factors[w]
        return result

    return total, top[0], weight[0]


@dataclass(frozen=True)
class _Whole:
    """Where the results of a head go that one block has attended for: through the gate."""

    qg: Expr
    y: Expr
    D: int

    def store(self, row: Expr, head: Expr, split: Expr, d: Expr, total: Expr, weight: Expr) -> None:
        gate = sigmoid(self.qg[row, head * (2 * self.D) + self.D + d])
        store(self.y, total / weight * gate, row, head * self.D + d)

    def store_sums(self, row: Expr, head: Expr, split: Expr, thread: Expr, top: Expr, weight: Expr) -> None:  # fmt: skip
        pass


@dataclass(frozen=True)
class _Part:
    """Where the results of a part of a head's cells go: for `attention_combine`."""

    parts: Expr
    D: int

    def store(self, row: Expr, head: Expr, split: Expr, d: Expr, total: Expr, weight: Expr) -> None:
        store(self.parts, total, row, head, split, d)

    def store_sums(self, row: Expr, head: Expr, split: Expr, thread: Expr, top: Expr, weight: Expr) -> None:  # fmt: skip
        with when(thread == 0):
            store(self.parts, top, row, head, split, self.D)
            store(self.parts, weight, row, head, split, self.D + 1)


def _results(others: dict[str, Expr], tokens: Expr, Hq: int, D: int, splits: int) -> _Whole | _Part:
    if splits > 1:
        shape = (tokens, Hq, splits, D + PART_EXTRA)
        return _Part(array(others["parts"], shape, "float32"), D)
    qg, y = (array(others[n], (tokens, others[f"ld_{n}"]), "float32") for n in ("qg", "y"))
    return _Whole(qg, y, D)


def _attention_arguments(p: Parameters) -> str:
    return f"{CACHES[p['kv_dtype']].pointers} {_WHOLE if p['splits'] == 1 else _SPLIT}"


def _attention_cost(p: Parameters) -> Cost:
    size = p["Hq"] * p["D"]
    return Cost(
        bytes_per_cell=2 * p["Hkv"] * CELL_BYTES[p["kv_dtype"]](p["D"]),
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
