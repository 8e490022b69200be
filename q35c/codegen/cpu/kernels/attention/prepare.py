"""What precedes attention: norm and rotation of queries and keys, and the write to the cache.

    q = rotate(q * rsqrt(mean(q^2) + eps) * (1 + w)) * scale;   k likewise without scale, rounded to the cache's type

Threads split (token, head) pairs. Each head is read once and written once: bandwidth is the limit.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.attention.shape import (
    ByteCache,
    Cache,
    PairedCache,
    cell_bytes,
    cell_scale,
    make_cache,
    value_width,
)
from q35c.codegen.cpu.kernels.family import F32_BYTES, Family, Parameters
from q35c.codegen.cpu.kernels.vectors import (
    STACK,
    Expr,
    hsum,
    largest_magnitude,
    narrow,
    nearest,
    ramp,
    share,
    splat,
    vector,
    vrsqrt,
)
from q35c.layouts.cache import CELLS


@T.inline
def normalise(D, L, eps, x, row, column, w, head):
    """head[d] = x[row, column + d] * rsqrt(mean + eps) * (1 + w[d])."""
    squares = T.alloc_buffer((L,), "float32")
    squares[ramp(0, L)] = splat(0.0, L)
    for v in T.serial(D // L):
        squares[ramp(0, L)] = (
            squares[ramp(0, L)] + x[row, ramp(column + v * L, L)] * x[row, ramp(column + v * L, L)]
        )
    mean: T.let[T.float32] = hsum(squares[ramp(0, L)], L) * T.float32(1.0 / D)
    factor: T.let[T.float32] = vrsqrt(mean + T.float32(eps), 1)
    for v in T.serial(D // L):
        head[ramp(v * L, L)] = (
            x[row, ramp(column + v * L, L)] * splat(factor, L) * (w[ramp(v * L, L)] + splat(1.0, L))
        )


@T.inline
def rotate(R, head, table, row):
    """Rotate the pairs (i, i + R/2) of the first R dims in place."""
    for i in T.serial(R // 2):
        a: T.let[T.float32] = head[i]
        b: T.let[T.float32] = head[R // 2 + i]
        head[i] = a * table[row, i] - b * table[row, R // 2 + i]
        head[R // 2 + i] = b * table[row, i] + a * table[row, R // 2 + i]


def stored(cache: Cache, x):
    return x if cache.dtype == "f32" else narrow(x, 1)


@T.inline
def store_key(cache, state, base, kv_head, cell, head):
    """Write one key: a strided column of its block."""
    at: T.let[T.int64] = cache.key(base, kv_head, T.shift_right(cell, T.int64(5)))
    lane: T.let[T.int64] = T.bitwise_and(cell, T.int64(CELLS - 1))
    for d in T.serial(cache.D):
        state[at + d * CELLS + lane] = stored(cache, head[d])


@T.inline
def store_value(cache, state, base, kv_head, cell, v, row, column):
    at: T.let[T.int64] = cache.value(base, kv_head, cell)
    for d in T.serial(cache.D):
        state[at + d] = stored(cache, v[row, column + d])


@T.inline
def store_cell(cache, state, base, kv_head, cell, is_last, head, v, row, column):
    store_key(cache, state, base, kv_head, cell, head)
    store_value(cache, state, base, kv_head, cell, v, row, column)


@T.inline
def store_paired_cell(cache, state, base, kv_head, cell, is_last, head, v, row, column):
    """Write one cell as halves of words; `base` and the cache count in words, `state` in halves.

    An even cell shares its words with the next one. If that is not written in this call, it is made zero: attention
    multiplies what is there, though by a weight of zero, and something older could be infinite.
    """
    block: T.let[T.int64] = T.shift_right(cell, T.int64(5))
    lane: T.let[T.int64] = T.bitwise_and(cell, T.int64(CELLS - 1))
    W, L = T.meta_var(value_width(cache.D)), T.meta_var(16)
    keys: T.let[T.int64] = (cache.key(base, kv_head, block) + lane) * 2
    values: T.let[T.int64] = (
        cache.value(base, kv_head, cell) * 2
        + T.shift_right(lane, T.int64(1)) * (2 * W)
        + T.bitwise_and(lane, T.int64(1))
    )
    halves = T.alloc_buffer((cache.D,), "uint16", annotations=STACK)
    for i in T.serial(cache.D // L):
        halves[ramp(i * L, L)] = narrow(head[ramp(i * L, L)], L)
    for pair in T.serial(cache.D // 2):
        state[ramp(keys + pair * (2 * CELLS), 2)] = halves[ramp(pair * 2, 2)]
    for i in T.serial(cache.D // L):
        halves[ramp(i * L, L)] = narrow(v[row, ramp(column + i * L, L)], L)
    for group in T.serial(cache.D // W):
        for d in T.serial(W):
            state[values + group * (CELLS * W) + d * 2] = halves[group * W + d]
    if is_last and T.bitwise_and(lane, T.int64(1)) == 0:
        for group in T.serial(cache.D // W):
            for d in T.serial(W):
                state[values + group * (CELLS * W) + d * 2 + 1] = T.uint16(0)


def round_head(cache: ByteCache, head: Expr, codes: Expr, state: Expr, scale_at: Expr) -> None:
    """Emit codes = nearest(head / scale) and the store of scale = max |head| / 127.

    A head that holds what is not finite gets such a scale.
    """
    L = 16
    vectors = [ramp(d, L) for d in range(0, cache.D, L)]
    top = T.Bind(largest_magnitude([head[at] for at in vectors], L))
    factor = T.Bind(T.Select(top == T.float32(0), T.float32(0), T.float32(127) / top))
    for at in vectors:
        code = T.cast(nearest(head[at] * splat(factor, L), L), vector("int8", L))
        T.buffer_store(codes, code, [at])
    scale = T.reinterpret(top * T.float32(1 / 127), dtype="int8x4")
    T.buffer_store(state, scale, [ramp(scale_at, 4)])


@T.inline
def store_byte_cell(cache, state, base, kv_head, cell, is_last, head, v, row, column):
    """Write one cell as int8 with a scale for its key and one for its value.

    Nothing that shares a word with it need be cleared: no byte times a weight of zero is anything but zero.
    """
    block: T.let[T.int64] = T.shift_right(cell, T.int64(5))
    lane: T.let[T.int64] = T.bitwise_and(cell, T.int64(CELLS - 1))
    keys: T.let[T.int64] = cache.key(base, kv_head, block)
    values: T.let[T.int64] = cache.value(base, kv_head, cell)
    W = T.meta_var(value_width(cache.D))
    codes = T.alloc_buffer((cache.D,), "int8", annotations=STACK)
    round_head(cache, head, codes, state, keys + cell_scale(cache.D, lane))
    for d in T.serial(cache.D // 2):
        state[keys + d * (2 * CELLS) + lane * 2] = codes[d]
        state[keys + d * (2 * CELLS) + lane * 2 + 1] = codes[cache.D // 2 + d]
    for d in T.serial(cache.D // 8):
        head[ramp(d * 8, 8)] = v[row, ramp(column + d * 8, 8)]
    round_head(cache, head, codes, state, values + cell_scale(cache.D, lane))
    first: T.let[T.int64] = (
        values + T.bitwise_and(lane, T.int64(15)) * (2 * W) + T.shift_right(lane, T.int64(4))
    )
    for group in T.serial(cache.D // W):
        for d in T.serial(W):
            state[first + group * (CELLS * W) + d * 2] = codes[group * W + d]


STORES = {Cache: store_cell, PairedCache: store_paired_cell, ByteCache: store_byte_cell}


def attention_prepare(
    Hq: int, Hkv: int, D: int, R: int, eps: float, scale: float, kv_dtype: str, context: int,
    k_offset_bytes: int, v_offset_bytes: int, rows: str, isa: Isa,
) -> PrimFunc:  # fmt: skip
    """Make the kernel (QG f32 [T, Hq * 2D], K, V f32 [T, Hkv * D], Q_NORM, K_NORM f32 [D], TABLE f32 [T, R],
    Q_OUT f32 [T, Hq * D], STATE, SLOTS i64 [B], STARTS i32 [B], T, ld_qg, ld_k, ld_v, tid, nt).
    """
    cache = make_cache(Hkv, D, kv_dtype, context, k_offset_bytes, v_offset_bytes, isa)
    store = STORES[type(cache)]
    L, heads, is_batch = isa.lanes, Hq + Hkv, rows == "batch"
    element = {"f32": "float32", "bf16": "uint16", "int8": "int8"}[kv_dtype]

    @T.prim_func(private=True, s_tir=True)
    def attention_prepare_kernel(
        QG: T.handle("float32"),
        K: T.handle("float32"),
        V: T.handle("float32"),
        Q_NORM: T.handle("float32"),
        K_NORM: T.handle("float32"),
        TABLE: T.handle("float32"),
        Q_OUT: T.handle("float32"),
        STATE: T.handle(element),
        SLOTS: T.handle("int64"),
        STARTS: T.handle("int32"),
        tokens: T.int64,
        ld_qg: T.int64,
        ld_k: T.int64,
        ld_v: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        qg = T.decl_buffer((tokens, ld_qg), "float32", data=QG)
        k = T.decl_buffer((tokens, ld_k), "float32", data=K)
        v = T.decl_buffer((tokens, ld_v), "float32", data=V)
        q_norm = T.decl_buffer((D,), "float32", data=Q_NORM)
        k_norm = T.decl_buffer((D,), "float32", data=K_NORM)
        table = T.decl_buffer((tokens, R), "float32", data=TABLE)
        q_out = T.decl_buffer((tokens, Hq * D), "float32", data=Q_OUT)
        state = T.decl_buffer((T.int64(1) << 48,), element, data=STATE)
        slots = T.decl_buffer((tokens,), "int64", data=SLOTS)
        starts = T.decl_buffer((tokens,), "int32", data=STARTS)
        first: T.let[T.int64] = share(tokens * heads, tid, nt)
        last: T.let[T.int64] = share(tokens * heads, tid + 1, nt)
        head = T.alloc_buffer((D,), "float32", annotations=STACK)
        for item in T.serial(last - first):
            row: T.let[T.int64] = T.truncdiv(first + item, T.int64(heads))
            h: T.let[T.int64] = first + item - row * heads
            if h < Hq:
                normalise(D, L, eps, qg, row, h * (2 * D), q_norm, head)
                rotate(R, head, table, row)
                for d in T.serial(D // L):
                    q_out[row, ramp(h * D + d * L, L)] = head[ramp(d * L, L)] * splat(scale, L)
            else:
                sequence: T.let[T.int64] = row if is_batch else T.int64(0)
                ahead: T.let[T.int64] = T.int64(0) if is_batch else row
                base: T.let[T.int64] = cache.base(slots[sequence])
                cell: T.let[T.int64] = T.cast(starts[sequence], "int64") + ahead
                normalise(D, L, eps, k, row, (h - Hq) * D, k_norm, head)
                rotate(R, head, table, row)
                is_last: T.let[T.bool] = T.bool(True) if is_batch else row == tokens - 1
                store(cache, state, base, h - Hq, cell, is_last, head, v, row, (h - Hq) * D)
        return T.int32(0)

    return attention_prepare_kernel


def _cost(p: Parameters) -> Cost:
    queries, keys = p["Hq"] * p["D"], p["Hkv"] * p["D"]
    return Cost(
        bytes_per_token=2 * keys * cell_bytes(p["kv_dtype"], p["D"]),
        cached_bytes_per_token=(2 * queries + 2 * keys) * F32_BYTES,
        operations_per_token=8 * (queries + keys),
    )


ATTENTION_PREPARE = Family(
    attention_prepare,
    "qg k v q_norm k_norm table q_out state slots starts tokens ld_qg ld_k ld_v",
    writes="q_out state",
    cost=_cost,
)
