"""Gated flash attention over the cache: one pass over the keys, online softmax, grouped queries.

    out = softmax(q K^T over cells 0..start+t) V * sigmoid(gate)

A task is (a few tokens, one key head): all query heads that share the key head, for all its tokens, meet each block
of 32 keys while it is in L1, in register tiles of a few rows. In decode the cells are further split into `splits` parts
that `attention_combine` merges, so that threads share one sequence.

This file has the tasks and the combine. A task is done in f32 by f32.py or, for a cache of pairs, bf16 or
int8, by pairs.py, with its maxima in powers of two; both take steps of 64 cells.

Limit: FMA rate in prefill (4 T S D per head); bandwidth of the cache, 2 S D elements per key head, in decode.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost, Division
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.attention.bf16 import BF16
from q35c.codegen.cpu.kernels.attention.f32 import attend
from q35c.codegen.cpu.kernels.attention.int8 import INT8
from q35c.codegen.cpu.kernels.attention.pairs import Form, attend_paired, whole_power
from q35c.codegen.cpu.kernels.attention.shape import (
    FEWEST_QUERY_ROWS,
    LOWEST,
    STEP,
    AttentionShape,
    cell_bytes,
    make_cache,
    query_tokens,
)
from q35c.codegen.cpu.kernels.family import (
    EXP_OPERATIONS,
    F32_BYTES,
    PART_BYTES,
    Family,
    Parameters,
    Room,
    elementwise,
    peak_of,
    rounded_bytes,
)
from q35c.codegen.cpu.kernels.rows.round_int8 import Rounding
from q35c.codegen.cpu.kernels.vectors import STACK, Expr, ramp, share, splat, vexp, vsigmoid
from q35c.layouts.cache import CELLS
from q35c.layouts.weights import ceil_div


def attention_shape(
    Hq: int, Hkv: int, D: int, kv_dtype: str, context: int, k_offset_bytes: int, v_offset_bytes: int,
    rows: str, splits: int, isa: Isa,
) -> AttentionShape:  # fmt: skip
    """Return the shape of the kernel with these parameters."""
    cache = make_cache(Hkv, D, kv_dtype, context, k_offset_bytes, v_offset_bytes, isa)
    tokens = 1 if rows == "batch" else query_tokens(Hq // Hkv, isa)
    return AttentionShape(Hq, cache, tokens, splits, isa)


def paired_form(shape: AttentionShape) -> Form:
    """Return what the type of the cache's pairs decides."""
    return INT8 if shape.cache.dtype == "int8" else BF16


@T.inline
def attend_in_layout(
    shape, q, state, base, kv_head, first, tokens, start, first_step, end_step, end_cell, w, at
):
    """Attend by the form that the cache's layout is for."""
    if shape.is_paired:
        attend_paired(
            paired_form(shape), shape, q, state, base, kv_head, first, tokens, start, first_step, end_step, end_cell, w, at
        )  # fmt: skip
    else:
        attend(
            shape, q, state, base, kv_head, first, tokens, start, first_step, end_step, end_cell, w, at
        )  # fmt: skip


@T.inline
def store_head(shape, w, at, total, qg, y, row, head):
    """y[row, head] = sums / total * sigmoid(gate)."""
    L = T.meta_var(shape.lanes)
    inverse: T.let[T.float32] = T.float32(1) / total
    for v in T.serial(shape.D // L):
        y[row, ramp(head * shape.D + v * L, L)] = (
            w[ramp(at + v * L, L)]
            * splat(inverse, L)
            * vsigmoid(qg[row, ramp(head * (2 * shape.D) + shape.D + v * L, L)], L)
        )


@T.inline
def run_sequence(
    shape, q, qg, state, slots, starts, y, rounding, rounded, w, tokens, worker, tid, nt
):
    """Tasks are (tile of tokens, key head); the last tiles see most cells, so threads take them in turn."""
    groups: T.let[T.int64] = T.truncdiv(
        tokens + (shape.query_tokens - 1), T.int64(shape.query_tokens)
    )
    tasks: T.let[T.int64] = groups * shape.Hkv
    start: T.let[T.int64] = T.cast(starts[0], "int64")
    base: T.let[T.int64] = shape.cache.base(slots[0])
    at: T.let[T.int64] = T.cast(worker, "int64") * shape.task_words
    mine: T.let[T.int64] = T.truncdiv(tasks - tid + (nt - 1), T.cast(nt, "int64"))
    for item in T.serial(mine):
        task: T.let[T.int64] = item * nt + tid
        group: T.let[T.int64] = T.truncdiv(task, T.int64(shape.Hkv))
        kv_head: T.let[T.int64] = task - group * shape.Hkv
        first: T.let[T.int64] = group * shape.query_tokens
        live: T.let[T.int64] = T.min(tokens - first, T.int64(shape.query_tokens))
        end: T.let[T.int64] = start + first + live
        steps: T.let[T.int64] = T.truncdiv(end + (STEP - 1), T.int64(STEP))
        attend_in_layout(
            shape, q, state, base, kv_head, first, tokens, start, T.int64(0), steps, end, w, at
        )
        for row in T.serial(live * shape.group):
            token: T.let[T.int64] = T.truncdiv(row, T.int64(shape.group))
            head: T.let[T.int64] = kv_head * shape.group + row - token * shape.group
            row_at: T.let[T.int64] = at + row * shape.row_words
            store_head(shape, w, row_at, w[row_at + shape.D + 1], qg, y, first + token, head)
            rounding.columns(y, first + token, rounded, head * shape.D, shape.D)


@T.inline
def run_batch(shape, q, state, slots, starts, w, tokens, tid, nt):
    """Tasks are (row, key head, split); the partial results stay in the scratch for the combine."""
    tasks: T.let[T.int64] = tokens * (shape.Hkv * shape.splits)
    first: T.let[T.int64] = share(tasks, tid, nt)
    for item in T.serial(share(tasks, tid + 1, nt) - first):
        task: T.let[T.int64] = first + item
        head_task: T.let[T.int64] = T.truncdiv(task, T.int64(shape.splits))
        split: T.let[T.int64] = task - head_task * shape.splits
        row: T.let[T.int64] = T.truncdiv(head_task, T.int64(shape.Hkv))
        kv_head: T.let[T.int64] = head_task - row * shape.Hkv
        cell: T.let[T.int64] = T.cast(starts[row], "int64")
        steps: T.let[T.int64] = T.truncdiv(cell + STEP, T.int64(STEP))
        begin: T.let[T.int64] = T.truncdiv(steps * split, T.int64(shape.splits))
        end: T.let[T.int64] = T.truncdiv(steps * (split + 1), T.int64(shape.splits))
        # start is chosen so that the row's limit, start + row, is its own cell.
        attend_in_layout(
            shape, q, state, shape.cache.base(slots[row]), kv_head, row, tokens, cell - row,
            begin, end, cell + 1, w, task * shape.task_words,
        )  # fmt: skip


def weight_of(shape: AttentionShape, difference: Expr) -> Expr:
    """Return the factor for sums whose maximum is lower by this much; paired ones count in powers of two."""
    return whole_power(difference) if shape.is_paired else vexp(difference, 1)


@T.inline
def merge_split(shape, w, part, best, merged):
    """Add the sums of one split, which are relative to its own maximum."""
    L = T.meta_var(shape.lanes)
    factor: T.let[T.float32] = weight_of(shape, w[part + shape.D] - best[0])
    best[1] = best[1] + w[part + shape.D + 1] * factor
    for v in T.serial(shape.D // L):
        merged[ramp(v * L, L)] = merged[ramp(v * L, L)] + w[ramp(part + v * L, L)] * splat(
            factor, L
        )


def attention(
    Hq: int, Hkv: int, D: int, kv_dtype: str, context: int, k_offset_bytes: int, v_offset_bytes: int,
    rows: str, splits: int, isa: Isa, group: int = 0,
) -> PrimFunc:  # fmt: skip
    """Make the kernel (Q f32 [T, Hq * D] scaled, QG f32 [T, Hq * 2D], STATE, SLOTS i64 [B], STARTS i32 [B],
    Y f32 [T, Hq * D], ROUNDED, SCRATCH, T, ld_qg, ld_y, ld_rounded, worker, tid, nt). In "batch" it leaves Y to
    `attention_combine`. With a `group`, of which D is a multiple, ROUNDED gets what `quantize_rows` makes of Y.
    """
    shape = attention_shape(
        Hq, Hkv, D, kv_dtype, context, k_offset_bytes, v_offset_bytes, rows, splits, isa
    )
    is_batch = rows == "batch"
    rounding = Rounding(Hq * D, group, isa)

    @T.prim_func(private=True, s_tir=True)
    def attention_kernel(
        Q: T.handle("float32"),
        QG: T.handle("float32"),
        STATE: T.handle(shape.cache.element),
        SLOTS: T.handle("int64"),
        STARTS: T.handle("int32"),
        Y: T.handle("float32"),
        ROUNDED: T.handle("int32"),
        SCRATCH: T.handle("float32"),
        tokens: T.int64,
        ld_qg: T.int64,
        ld_y: T.int64,
        ld_rounded: T.int64,
        worker: T.int32,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        q = T.decl_buffer((tokens, Hq * D), "float32", data=Q)
        qg = T.decl_buffer((tokens, ld_qg), "float32", data=QG)
        state = T.decl_buffer((T.int64(1) << 48,), shape.cache.element, data=STATE)
        slots = T.decl_buffer((tokens,), "int64", data=SLOTS)
        starts = T.decl_buffer((tokens,), "int32", data=STARTS)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        rounded = T.decl_buffer((tokens, ld_rounded), "int32", data=ROUNDED)
        w = T.decl_buffer((T.int64(1) << 40,), "float32", data=SCRATCH)
        if is_batch:
            run_batch(shape, q, state, slots, starts, w, tokens, tid, nt)
        else:
            run_sequence(
                shape, q, qg, state, slots, starts, y, rounding, rounded, w, tokens, worker, tid, nt
            )
        return T.int32(0)

    return attention_kernel


def attention_combine(
    Hq: int, Hkv: int, D: int, kv_dtype: str, splits: int, isa: Isa, group: int = 0
) -> PrimFunc:
    """Make the kernel (SCRATCH, QG, Y, ROUNDED, T, ld_qg, ld_y, ld_rounded, tid, nt) that merges the splits of each
    (row, head). `group` and ROUNDED are those of `attention`.
    """
    shape = attention_shape(Hq, Hkv, D, kv_dtype, CELLS, 0, 0, "batch", splits, isa)
    L, rounding = isa.lanes, Rounding(Hq * D, group, isa)

    @T.prim_func(private=True, s_tir=True)
    def attention_combine_kernel(
        SCRATCH: T.handle("float32"),
        QG: T.handle("float32"),
        Y: T.handle("float32"),
        ROUNDED: T.handle("int32"),
        tokens: T.int64,
        ld_qg: T.int64,
        ld_y: T.int64,
        ld_rounded: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        w = T.decl_buffer((T.int64(1) << 40,), "float32", data=SCRATCH)
        qg = T.decl_buffer((tokens, ld_qg), "float32", data=QG)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        rounded = T.decl_buffer((tokens, ld_rounded), "int32", data=ROUNDED)
        first: T.let[T.int64] = share(tokens * Hq, tid, nt)
        merged = T.alloc_buffer((D,), "float32", annotations=STACK)
        best = T.alloc_buffer((2,), "float32")
        for item in T.serial(share(tokens * Hq, tid + 1, nt) - first):
            row: T.let[T.int64] = T.truncdiv(first + item, T.int64(Hq))
            head: T.let[T.int64] = first + item - row * Hq
            kv_head: T.let[T.int64] = T.truncdiv(head, T.int64(shape.group))
            task: T.let[T.int64] = (row * Hkv + kv_head) * splits
            at: T.let[T.int64] = (
                task * shape.task_words + (head - kv_head * shape.group) * shape.row_words
            )
            best[0] = T.float32(LOWEST)
            for s in T.serial(splits):
                best[0] = T.max(best[0], w[at + s * shape.task_words + D])
            best[1] = T.float32(0)
            for v in T.serial(D // L):
                merged[ramp(v * L, L)] = splat(0.0, L)
            for s in T.serial(splits):
                part: T.let[T.int64] = at + s * shape.task_words
                if w[part + D] != T.float32(LOWEST):  # else the split has no cell, and no sums
                    merge_split(shape, w, part, best, merged)
            store_head(shape, merged, T.int64(0), best[1], qg, y, row, head)
            rounding.columns(y, row, rounded, head * D, D)
        return T.int32(0)

    return attention_combine_kernel


def _scratch(p: Parameters, room: Room) -> int:
    """Scratch is that of all threads, or in decode of all (row, head, split) tasks."""
    shape = attention_shape(**p, isa=room.isa)
    is_batch = p["rows"] == "batch"
    return (
        4
        * shape.task_words
        * (room.tokens * shape.Hkv * shape.splits if is_batch else room.threads)
    )


def _division(p: Parameters) -> Division:
    if p["rows"] == "batch":  # keys and values, were the sequence half as long as it may become
        return Division(p["Hkv"] * p["splits"], p["context"] // 2 * p["Hkv"] * p["D"] * 4)
    # Of a task, on any target: more parts than tasks do no harm.
    return Division(ceil_div(p["Hq"] * p["context"], FEWEST_QUERY_ROWS), PART_BYTES)


def _cost(p: Parameters) -> Cost:
    """Scores and sums are 2 D operations each; every cell is read once for all query heads of its key head.

    An int8 cache meets integers of 16 bits, at half of the int8 peak: each product counts twice.
    """
    size, times = p["Hq"] * p["D"], 2 if p["kv_dtype"] == "int8" else 1
    return Cost(
        peak_of(p["kv_dtype"]),
        bytes_per_cell=2 * p["Hkv"] * p["D"] * cell_bytes(p["kv_dtype"], p["D"]),
        cached_bytes_per_token=3 * size * F32_BYTES + rounded_bytes(p, size),
        operations_per_score=4 * size * times,
    )


def _combine_cost(p: Parameters) -> Cost:
    size = p["Hq"] * p["D"]
    words = (p["splits"] + 2) * size + rounded_bytes(p, size) / F32_BYTES
    return elementwise(words, (3 * p["splits"] + EXP_OPERATIONS) * size)


ATTENTION = Family(
    attention,
    "q qg state slots starts y rounded scratch tokens ld_qg ld_y ld_rounded worker",
    writes="y rounded scratch",
    cost=_cost,
    scratch=_scratch,
    division=_division,
)
ATTENTION_COMBINE = Family(
    attention_combine,
    "scratch qg y rounded tokens ld_qg ld_y ld_rounded",
    writes="y rounded",
    cost=_combine_cost,
)
