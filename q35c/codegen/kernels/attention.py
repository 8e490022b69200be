"""Gated flash attention over the cache: one pass over the keys, online softmax, grouped queries.

    out = softmax(q K^T over cells 0..start+t) V * sigmoid(gate)

A task is (a few tokens, one key head): all query heads that share the key head, for all its tokens, meet each block
of 32 keys while it is in L1, in register tiles of 4 rows. Only a [4, 32] piece of the scores ever exists. In decode the
cells are further split into `splits` parts that `attention_combine` merges, so that threads share one sequence.
Cells that were never written are selected away, never multiplied: they may hold anything.

This file has the tasks, the combine, and the form that computes in f32. For a cache of pairs, bf16 or int8, a task
is done by attention_pairs.py instead, in steps of 64 cells and with its maxima in powers of two.

Limit: FMA rate in prefill (4 T S D per head); bandwidth of the cache, 2 S D elements per key head, in decode.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.attention_bf16 import BF16
from q35c.codegen.kernels.attention_int8 import INT8
from q35c.codegen.kernels.attention_pairs import LOWEST, Form, attend_paired, whole_power
from q35c.codegen.kernels.attention_shape import (
    CELLS,
    TILE_ROWS,
    AttentionShape,
    make_cache,
    query_tokens,
)
from q35c.codegen.kernels.common import STACK, Expr, hmax, hsum, ramp, share, splat, vexp, vsigmoid
from q35c.codegen.kernels.quantize import Rounding

_VECTORS = 2  # vectors of a register tile, in keys or in dims


def attention_shape(
    Hq: int, Hkv: int, D: int, kv_dtype: str, context: int, k_offset_bytes: int, v_offset_bytes: int,
    rows: str, splits: int, isa: Isa,
) -> AttentionShape:  # fmt: skip
    """Return the shape of the kernel with these parameters."""
    cache = make_cache(Hkv, D, kv_dtype, context, k_offset_bytes, v_offset_bytes, isa)
    tokens = 1 if rows == "batch" else query_tokens(Hq // Hkv, kv_dtype, isa)
    return AttentionShape(Hq, cache, tokens, splits, isa)


def attention_scratch_bytes(target: Any, max_tokens: int, parameters: dict[str, Any]) -> int:
    """Return the scratch of all threads, or in decode of all (row, head, split) tasks."""
    shape = attention_shape(**parameters, isa=target.isa)
    is_batch = parameters["rows"] == "batch"
    tasks = max_tokens * shape.Hkv * shape.splits if is_batch else target.max_threads
    return 4 * shape.task_words * tasks


@T.inline
def clear_rows(shape, w, at):
    """Start a task: no sums yet, the lowest maximum."""
    for r in T.serial(shape.tiles * TILE_ROWS):
        for v in T.serial(shape.D // shape.lanes):
            w[ramp(at + r * shape.row_words + v * shape.lanes, shape.lanes)] = splat(
                0.0, shape.lanes
            )
        w[at + r * shape.row_words + shape.D] = T.float32(LOWEST)
        w[at + r * shape.row_words + shape.D + 1] = T.float32(0)


@T.inline
def score_tile(shape, q, q_row, q_column, limit, state, keys, block, half, scores):
    """scores[r, cells of this half] = q_r . k, or the lowest score for cells behind the row's limit."""
    L = T.meta_var(shape.lanes)
    acc = T.alloc_buffer((TILE_ROWS, _VECTORS, shape.lanes), "float32", annotations=STACK)
    for r in T.unroll(TILE_ROWS):
        for j in T.unroll(_VECTORS):
            acc[r, j, ramp(0, L)] = splat(0.0, L)
    for d in T.serial(shape.D):
        for r in T.unroll(TILE_ROWS):
            for j in T.unroll(_VECTORS):
                acc[r, j, ramp(0, L)] = acc[r, j, ramp(0, L)] + shape.cache.load(
                    state, keys + d * CELLS + (half * _VECTORS + j) * L, L
                ) * splat(q[q_row[r], q_column[r] + d], L)
    for r in T.unroll(TILE_ROWS):
        for j in T.unroll(_VECTORS):
            scores[r, ramp((half * _VECTORS + j) * L, L)] = T.Select(
                T.ramp(T.cast(block * CELLS + (half * _VECTORS + j) * L, "int32"), 1, L)
                <= T.broadcast(limit[r], L),
                acc[r, j, ramp(0, L)],
                splat(LOWEST, L),
            )


@T.inline
def soften_row(shape, scores, r, limit, block, w, row):
    """Online softmax of one row of scores: update its maximum and sum, leave weights in scores.

    The factor for the sums so far is left behind the row's maximum and sum.
    """
    L = T.meta_var(shape.lanes)
    best = T.alloc_buffer((shape.lanes,), "float32")
    total = T.alloc_buffer((shape.lanes,), "float32")
    best[ramp(0, L)] = scores[r, ramp(0, L)]
    for j in T.unroll(1, CELLS // L):
        best[ramp(0, L)] = T.max(best[ramp(0, L)], scores[r, ramp(j * L, L)])
    old: T.let[T.float32] = w[row + shape.D]
    new: T.let[T.float32] = T.max(old, hmax(best[ramp(0, L)], L))
    total[ramp(0, L)] = splat(0.0, L)
    for j in T.unroll(CELLS // L):
        scores[r, ramp(j * L, L)] = T.Select(
            T.ramp(T.cast(block * CELLS + j * L, "int32"), 1, L) <= T.broadcast(limit[r], L),
            vexp(scores[r, ramp(j * L, L)] - splat(new, L), L),
            splat(0.0, L),
        )
        total[ramp(0, L)] = total[ramp(0, L)] + scores[r, ramp(j * L, L)]
    factor: T.let[T.float32] = vexp(old - new, 1)
    w[row + shape.D] = new
    w[row + shape.D + 1] = w[row + shape.D + 1] * factor + hsum(total[ramp(0, L)], L)
    w[row + shape.D + 2] = factor


@T.inline
def value_tile(shape, scores, state, values, cells, w, rows, column, vectors):
    """sums = sums * factor + scores V for 4 rows and a few vectors of dims."""
    L = T.meta_var(shape.lanes)
    acc = T.alloc_buffer((TILE_ROWS, vectors, shape.lanes), "float32", annotations=STACK)
    for r in T.unroll(TILE_ROWS):
        for j in T.unroll(vectors):
            acc[r, j, ramp(0, L)] = w[ramp(rows + r * shape.row_words + column + j * L, L)] * splat(
                w[rows + r * shape.row_words + shape.D + 2], L
            )
    for cell in T.serial(cells):
        for r in T.unroll(TILE_ROWS):
            for j in T.unroll(vectors):
                acc[r, j, ramp(0, L)] = acc[r, j, ramp(0, L)] + shape.cache.load(
                    state, values + cell * shape.D + column + j * L, L
                ) * splat(scores[r, cell], L)
    for r in T.unroll(TILE_ROWS):
        for j in T.unroll(vectors):
            w[ramp(rows + r * shape.row_words + column + j * L, L)] = acc[r, j, ramp(0, L)]


@T.inline
def add_values(shape, scores, state, values, cells, w, rows):
    """Fold a block's values into the sums of 4 rows, over all dims."""
    L = T.meta_var(shape.lanes)
    for v in T.serial(shape.D // (L * _VECTORS)):
        value_tile(shape, scores, state, values, cells, w, rows, v * (L * _VECTORS), _VECTORS)
    if shape.D % (L * _VECTORS) != 0:
        value_tile(shape, scores, state, values, cells, w, rows, shape.D - L, 1)


@T.inline
def attend(
    shape, q, state, base, kv_head, first, tokens, start, first_block, end_block, end_cell, w, at
):
    """Let the rows of one task attend to blocks first_block..end_block of cells before end_cell.

    Row r is query head kv_head * group + r % group of token first + r // group; rows beyond the last token
    repeat it and are not stored.
    """
    scores = T.alloc_buffer((TILE_ROWS, CELLS), "float32", annotations=STACK)
    q_row = T.alloc_buffer((TILE_ROWS,), "int64")
    q_column = T.alloc_buffer((TILE_ROWS,), "int64")
    limit = T.alloc_buffer((TILE_ROWS,), "int32")
    clear_rows(shape, w, at)
    for b in T.serial(end_block - first_block):
        block: T.let[T.int64] = first_block + b
        keys: T.let[T.int64] = shape.cache.key(base, kv_head, block)
        values: T.let[T.int64] = shape.cache.value(base, kv_head, block * CELLS)
        cells: T.let[T.int64] = T.min(end_cell - block * CELLS, T.int64(CELLS))
        for tile in T.serial(T.int64(shape.tiles)):
            for r in T.unroll(TILE_ROWS):
                row: T.let[T.int64] = T.min(tile * TILE_ROWS + r, T.int64(shape.rows - 1))
                q_row[r] = T.min(first + T.truncdiv(row, T.int64(shape.group)), tokens - 1)
                q_column[r] = (
                    kv_head * shape.group + T.truncmod(row, T.int64(shape.group))
                ) * shape.D
                limit[r] = T.cast(start + q_row[r], "int32")
            for half in T.unroll(CELLS // (_VECTORS * shape.lanes)):
                score_tile(shape, q, q_row, q_column, limit, state, keys, block, half, scores)
            rows: T.let[T.int64] = at + tile * (TILE_ROWS * shape.row_words)
            for r in T.unroll(TILE_ROWS):
                soften_row(shape, scores, r, limit, block, w, rows + r * shape.row_words)
            add_values(shape, scores, state, values, cells, w, rows)


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
def run_sequence(shape, q, qg, state, slots, starts, y, rounding, rounded, w, tokens, tid, nt):
    """Tasks are (tile of tokens, key head); the last tiles see most cells, so threads take them in turn."""
    groups: T.let[T.int64] = T.truncdiv(
        tokens + (shape.query_tokens - 1), T.int64(shape.query_tokens)
    )
    tasks: T.let[T.int64] = groups * shape.Hkv
    start: T.let[T.int64] = T.cast(starts[0], "int64")
    base: T.let[T.int64] = shape.cache.base(slots[0])
    at: T.let[T.int64] = T.cast(tid, "int64") * shape.task_words
    mine: T.let[T.int64] = T.truncdiv(tasks - tid + (nt - 1), T.cast(nt, "int64"))
    for item in T.serial(mine):
        task: T.let[T.int64] = item * nt + tid
        group: T.let[T.int64] = T.truncdiv(task, T.int64(shape.Hkv))
        kv_head: T.let[T.int64] = task - group * shape.Hkv
        first: T.let[T.int64] = group * shape.query_tokens
        live: T.let[T.int64] = T.min(tokens - first, T.int64(shape.query_tokens))
        end: T.let[T.int64] = start + first + live
        steps: T.let[T.int64] = T.truncdiv(end + (shape.step - 1), T.int64(shape.step))
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
        steps: T.let[T.int64] = T.truncdiv(cell + shape.step, T.int64(shape.step))
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
    Y f32 [T, Hq * D], ROUNDED, SCRATCH, T, ld_qg, ld_y, ld_rounded, tid, nt). In "batch" it leaves Y to
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
                shape, q, qg, state, slots, starts, y, rounding, rounded, w, tokens, tid, nt
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
