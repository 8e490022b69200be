"""Attention of a vision tower: every patch of a picture attends to all of them, heads of their own keys and values.

    q, k = rotate(parts of qkv);   out = softmax(q k^T * scale) v

`picture_prepare` rotates, and lays keys and values of each head out in the arena: in bf16 pairs where the instruction set
multiplies those and the tower computes in bf16 (picture_pairs.py), else in f32 as the cache of a text model. Behind a head's
last dim come zeros, up to a whole vector; they add nothing. `picture_attention` then does tasks of (head, a few patches), each
over all cells, by picture_pairs.py or f32.py. Threads take the tasks of one head after the other, so that its keys and values stay in L2.

Limit: the rate of the instruction that multiplies and adds, 4 T D operations for each patch and head.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost, Division
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.attention.f32 import attend
from q35c.codegen.cpu.kernels.attention.picture_pairs import (
    ROWS,
    PairedPicture,
    attend_to_all,
    inverse_of_row,
    store_cell,
)
from q35c.codegen.cpu.kernels.attention.prepare import rotate
from q35c.codegen.cpu.kernels.attention.prepare import store_cell as store_f32_cell
from q35c.codegen.cpu.kernels.attention.shape import (
    FEWEST_QUERY_ROWS,
    STEP,
    AttentionShape,
    is_paired,
    make_cache,
    query_tokens,
)
from q35c.codegen.cpu.kernels.family import (
    F32_BYTES,
    PART_BYTES,
    Family,
    Parameters,
    Room,
    peak_of,
    row_bytes,
)
from q35c.codegen.cpu.kernels.rows.round_bf16 import bf16_element, store_bf16
from q35c.codegen.cpu.kernels.vectors import STACK, Expr, ramp, share, splat
from q35c.layouts.weights import ceil_div

DIMS = 16  # a head's dims are padded to a multiple of it
Shape = AttentionShape | PairedPicture


def padded_dims(D: int) -> int:
    """Return the dims of a head with the zeros behind them."""
    return ceil_div(D, DIMS) * DIMS


def picture_shape(H: int, D: int, kv_dtype: str, cells: int, isa: Isa) -> Shape:
    """Return the shape of attention to up to `cells` cells, a multiple of 64."""
    padded = padded_dims(D)
    if is_paired(kv_dtype, isa):
        return PairedPicture(padded, cells, isa)
    cache = make_cache(H, padded, "f32", cells, 0, H * cells * padded * F32_BYTES, isa)
    return AttentionShape(H, cache, query_tokens(1, isa), 1, isa, is_causal=False)


def cell_words(H: int, D: int, kv_dtype: str, isa: Isa) -> int:
    """Return the 4-byte words that a cell's keys and values of all heads take."""
    words = H * padded_dims(D)
    return words if is_paired(kv_dtype, isa) else 2 * words


@T.inline
def _store(shape, state, h, row, is_last, head, value):
    if isinstance(shape, PairedPicture):
        store_cell(shape, state, h, row, is_last, head, value)
    else:
        store_f32_cell(
            shape.cache, state, T.int64(0), h, row, is_last, head, value, T.int64(0), T.int64(0)
        )


def picture_prepare(H: int, D: int, scale: float, kv_dtype: str, cells: int, isa: Isa) -> PrimFunc:
    """Make the kernel (QKV f32 [T, 3 H D], TABLE f32 [T, D], Q f32 [T, H * D padded], CELLS, T, ld_qkv, tid, nt).

    CELLS holds keys and values of up to `cells` patches, a multiple of 64; what it held before does not matter.
    """
    shape, padded = picture_shape(H, D, kv_dtype, cells, isa), padded_dims(D)
    element = "uint16" if isinstance(shape, PairedPicture) else "float32"

    @T.prim_func(private=True, s_tir=True)
    def picture_prepare_kernel(
        QKV: T.handle("float32"),
        TABLE: T.handle("float32"),
        Q: T.handle("float32"),
        CELLS: T.handle(element),
        tokens: T.int64,
        ld_qkv: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        qkv = T.decl_buffer((tokens, ld_qkv), "float32", data=QKV)
        table = T.decl_buffer((tokens, D), "float32", data=TABLE)
        q = T.decl_buffer((tokens, H * padded), "float32", data=Q)
        state = T.decl_buffer((T.int64(1) << 48,), element, data=CELLS)
        head = T.alloc_buffer((padded,), "float32", annotations=STACK)
        value = T.alloc_buffer((1, padded), "float32", annotations=STACK)
        for d in T.serial(padded - D):
            head[D + d] = T.float32(0)
            value[0, D + d] = T.float32(0)
        first: T.let[T.int64] = share(tokens * H, tid, nt)
        for item in T.serial(share(tokens * H, tid + 1, nt) - first):
            row: T.let[T.int64] = T.truncdiv(first + item, T.int64(H))
            h: T.let[T.int64] = first + item - row * H
            for d in T.serial(D):
                head[d] = qkv[row, h * D + d]
            rotate(D, head, table, row)
            for d in T.serial(padded):
                q[row, h * padded + d] = head[d] * T.float32(scale)
            for d in T.serial(D):
                head[d] = qkv[row, (H + h) * D + d]
                value[0, d] = qkv[row, (2 * H + h) * D + d]
            rotate(D, head, table, row)
            is_last: T.let[T.bool] = row == tokens - 1
            _store(shape, state, h, row, is_last, head, value)
        return T.int32(0)

    return picture_prepare_kernel


def picture_attention(
    H: int, D: int, kv_dtype: str, cells: int, isa: Isa, result: str = "f32"
) -> PrimFunc:
    """Make the kernel (Q, CELLS as `picture_prepare` leaves them, Y [T, H * D], SCRATCH, T, ld_y, worker, tid, nt).

    Y is f32, or rows as `round_rows` leaves them if the `result` is "bf16".
    """
    shape, padded = picture_shape(H, D, kv_dtype, cells, isa), padded_dims(D)
    rows = task_rows(shape)
    is_rounded = result == "bf16"
    element, halves = bf16_element(isa) if is_rounded else ("float32", 1)
    state_element = "int32" if isinstance(shape, PairedPicture) else "float32"

    @T.prim_func(private=True, s_tir=True)
    def picture_attention_kernel(
        Q: T.handle("float32"),
        CELLS: T.handle(state_element),
        Y: T.handle(element),
        SCRATCH: T.handle("float32"),
        tokens: T.int64,
        ld_y: T.int64,
        worker: T.int32,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        q = T.decl_buffer((tokens, H * padded), "float32", data=Q)
        state = T.decl_buffer((T.int64(1) << 48,), state_element, data=CELLS)
        y = T.decl_buffer((tokens, ld_y * halves), element, data=Y)
        w = T.decl_buffer((T.int64(1) << 40,), "float32", data=SCRATCH)
        groups: T.let[T.int64] = T.truncdiv(tokens + (rows - 1), T.int64(rows))
        at: T.let[T.int64] = T.cast(worker, "int64") * shape.task_words
        begin: T.let[T.int64] = share(groups * H, tid, nt)
        for item in T.serial(share(groups * H, tid + 1, nt) - begin):
            h: T.let[T.int64] = T.truncdiv(begin + item, groups)
            first: T.let[T.int64] = (begin + item - h * groups) * rows
            _attend(shape, q, state, h, first, tokens, w, at)
            for r in T.serial(T.min(tokens - first, T.int64(rows))):
                row_at: T.let[T.int64] = at + r * shape.row_words
                inverse: T.let[T.float32] = _inverse(shape, w, row_at)
                _store_head(isa.lanes, D, w, row_at, inverse, y, first + r, h, is_rounded)
        return T.int32(0)

    return picture_attention_kernel


def task_rows(shape: Shape) -> int:
    """Return the patches of a task."""
    return ROWS if isinstance(shape, PairedPicture) else shape.query_tokens


def _attend(
    shape: Shape, q: Expr, state: Expr, h: Expr, first: Expr, tokens: Expr, w: Expr, at: Expr
) -> None:
    """Emit one task: some patches attend to all cells, for one head."""
    if isinstance(shape, PairedPicture):
        attend_to_all(shape, q, state, h, first, tokens, w, at)
        return
    zero = T.int64(0)
    steps = T.truncdiv(tokens + (STEP - 1), T.int64(STEP))
    attend(shape, q, state, zero, h, first, tokens, zero, zero, steps, tokens, w, at)


def _inverse(shape: Shape, w: Expr, at: Expr) -> Expr:
    """Return one divided by the sum of a row's weights."""
    if isinstance(shape, PairedPicture):
        return inverse_of_row(shape, w, at)
    return T.float32(1) / w[at + (shape.D + 1)]


def _store_head(
    L: int, D: int, w: Expr, at: Expr, inverse: Expr, y: Expr, row: Expr, h: Expr, is_rounded: bool
) -> None:
    """Emit y[row, head] = sums * inverse; where D is no whole number of vectors the last one begins earlier."""
    for column in [*range(0, D - L, L), D - L]:
        value = w[ramp(at + column, L)] * splat(inverse, L)
        columns = ramp(h * D + column, L)
        if is_rounded:
            store_bf16(y, value, row, columns, L)
        else:
            T.buffer_store(y, value, [row, columns])


def _cells(p: Parameters, room: Room) -> int:
    """Return the bytes of the keys and values that the kernel makes."""
    return F32_BYTES * p["cells"] * cell_words(p["H"], p["D"], p["kv_dtype"], room.isa)


def _scratch(p: Parameters, room: Room) -> int:
    shape = picture_shape(p["H"], p["D"], p["kv_dtype"], p["cells"], room.isa)
    return 4 * shape.task_words * room.threads


def _cost(p: Parameters) -> Cost:
    """Scores and sums are 2 D operations each."""
    size = p["H"] * p["D"]
    return Cost(
        peak_of(p["kv_dtype"]),
        cached_bytes_per_token=size * F32_BYTES + row_bytes(size, p["result"]),
        operations_per_score=4 * size,
    )


def _prepare_cost(p: Parameters) -> Cost:
    size = p["H"] * p["D"]
    return Cost(cached_bytes_per_token=7 * size * F32_BYTES, operations_per_token=16 * size)


PICTURE_PREPARE = Family(
    picture_prepare,
    "qkv table q cells tokens ld_qkv",
    writes="q cells",
    cost=_prepare_cost,
    scratch=_cells,
)
PICTURE_ATTENTION = Family(
    picture_attention,
    "q cells y scratch tokens ld_y worker",
    writes="y scratch",
    cost=_cost,
    scratch=_scratch,
    division=lambda p: Division(p["H"] * ceil_div(p["cells"], FEWEST_QUERY_ROWS), PART_BYTES),
)
