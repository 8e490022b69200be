"""The inner part of attention by products of pairs, whatever their type: steps, masks, and the online softmax's frame.

    w = 2^(s - m), s in bits, m whole and >= every s so far;   out = sum(w V) / sum(w)

Per step of 64 cells, for all rows of a task: scores in register tiles of a few rows, the weights, then the sums.
Panels of keys and values are the outer loops, so that each comes into L1 once for up to 64 rows; blocks behind the last
token are left out, and only steps that reach past the first token are masked.

Since m is whole, a new maximum multiplies old sums by a power of two and no weight rounds differently: a row's result
depends on the order of its sums alone, neither on the rows beside it nor on where a prompt or the context was cut.

What depends on the type of the pairs is a `Form`: bf16.py and int8.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.apply import apply
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.attention.shape import LOWEST, STEP, AttentionShape
from q35c.codegen.cpu.kernels.vectors import (
    STACK,
    Expr,
    fetch,
    from_bits,
    hmax,
    horner,
    hsum,
    let,
    ramp,
    splat,
    splat_int,
    vector,
)
from q35c.layouts.cache import CELLS

# 2^f = 1 + f * tail(f) on |f| <= 1/2; minimax, relative error 3e-6: small beside the rounding that follows.
_POWER_TAIL = (0.009582852944731712, 0.055906426161527634, 0.24024099111557007, 0.6931241750717163)


Scale = Callable[[Isa, Expr, Expr], Expr]


def whole_power(x: Expr, lanes: int = 1) -> Expr:
    """Return 2^x of whole x <= 0; what is too small becomes 0."""
    exponent = T.cast(T.max(x, splat(-127.0, lanes)), vector("int32", lanes))
    return from_bits((exponent + splat_int(127, lanes)) << splat_int(23, lanes), lanes)


@dataclass(frozen=True)
class Work:
    """Hold one task's buffers: a row's queries, scores, weights, maximum, factor and sum of weights, and its sums.

    `sums` f32 is the kernel's scratch, where row r begins at `at` + r * row_words; the others are local.
    """

    shape: AttentionShape
    queries: Expr  # int32 [rows, D / 2]
    scores: Expr  # f32 [rows, STEP]
    weights: Expr  # int32 [rows, STEP / 2]
    scales: Expr  # f32 [rows, 2]: of integer queries, and of integer weights
    peak: Expr  # f32 [rows, lanes], all the same
    factor: Expr  # likewise: 2^(old maximum - new maximum)
    total: Expr  # f32 [rows, lanes], to be added up
    sums: Expr
    at: Expr
    live_tiles: Expr

    @staticmethod
    def make(shape: AttentionShape, sums: Expr, at: Expr, live_tokens: Expr) -> Work:
        """Allocate the local buffers: 0.9 KiB a row for head dim 256."""
        rows, lanes = shape.tiles * shape.tile_rows, shape.lanes

        def local(columns: int, dtype: str) -> Expr:
            return T.alloc_buffer((rows, columns), dtype, annotations=STACK)

        columns = -(-shape.D // (2 * lanes)) * lanes
        tiles = T.Bind(shape.live_tiles(live_tokens))
        return Work(
            shape, local(columns, "int32"), local(STEP, "float32"), local(STEP // 2, "int32"),
            local(2, "float32"), local(lanes, "float32"), local(lanes, "float32"), local(lanes, "float32"),
            sums, at, tiles,
        )  # fmt: skip

    @property
    def lanes(self) -> int:
        return self.shape.lanes

    @property
    def live_rows(self) -> Expr:
        return self.live_tiles * self.shape.tile_rows

    def row(self, row: Expr) -> Expr:
        """Return where a row's sums begin."""
        return self.at + row * self.shape.row_words

    def tile(self, vectors: int, dtype: str) -> Expr:
        """Return a register tile [tile rows, vectors, lanes]."""
        shape = (self.shape.tile_rows, vectors, self.lanes)
        return T.alloc_buffer(shape, dtype, annotations=STACK)


@dataclass(frozen=True)
class Form:
    """Hold what depends on the type of the pairs; all but `scale` emit statements.

    pack_query(work, q, row, token, column): the row's queries in pairs.
    score(work, state, keys, blocks): scores[row, cell of the step] = q_row . k for the blocks that hold cells.
    scale(isa, x, power): x * 2^power for whole powers <= 0; what is too small becomes 0, NaN stays NaN.
    pack_weights(work, state, values, row, weights, total): the step's weights in pairs; returns total + their sum.
    add_values(work, state, values, blocks, cells): sums = sums * factor + weights V, over all dims.
    """

    pack_query: Callable[[Work, Expr, Expr, Expr, Expr], None]
    score: Callable[[Work, Expr, Expr, Expr], None]
    scale: Scale
    pack_weights: Callable[[Work, Expr, Expr, Expr, list[Expr], Expr], Expr]
    add_values: Callable[[Work, Expr, Expr, Expr, Expr], None]


def attend_paired(
    form: Form, shape: AttentionShape, q: Expr, state: Expr, base: Expr, kv_head: Expr, first: Expr,
    tokens: Expr, start: Expr, first_step: Expr, end_step: Expr, end_cell: Expr, sums: Expr, at: Expr,
) -> None:  # fmt: skip
    """Emit what `attention.attend` does, for steps first_step..end_step of 64 cells before end_cell."""
    live_tokens = T.Bind(T.min(tokens - first, T.int64(shape.query_tokens)))
    work = Work.make(shape, sums, at, live_tokens)
    base = T.Bind(base)
    with T.If(end_step > first_step):
        with T.Then():
            _begin(form, work, q, first, kv_head, tokens)
            with T.serial(end_step - first_step) as i:
                cell = T.Bind((first_step + i) * STEP)
                blocks = T.Bind(T.min(T.truncdiv(end_cell - cell + (CELLS - 1), CELLS), T.int64(STEP // CELLS)))  # fmt: skip
                block = T.Bind(T.truncdiv(cell, CELLS))
                form.score(work, state, shape.cache.key(base, kv_head, block), blocks)
                with T.If(cell + (STEP - 1) > shape.last_cell(start, first, end_cell)), T.Then():
                    _mask(work, first, tokens, start, cell, end_cell)
                value = shape.cache.value(base, kv_head, cell)
                with T.serial(work.live_rows) as row:
                    _soften(form, work, state, value, row)
                form.add_values(work, state, value, blocks, end_cell - cell)
            _finish(work)
        with T.Else(), T.serial(work.live_rows) as row:
            T.buffer_store(sums, T.float32(LOWEST), [work.row(row) + shape.D])


def _begin(form: Form, work: Work, q: Expr, first: Expr, kv_head: Expr, tokens: Expr) -> None:
    """Emit the start of a task: queries in pairs, no sums yet, the lowest maximum."""
    shape, lanes = work.shape, work.lanes
    with T.serial(work.live_rows) as row:
        token = T.Bind(work.shape.token(first, row, tokens))
        head = T.Bind(kv_head * shape.group + T.truncmod(row, T.int64(shape.group)))
        form.pack_query(work, q, row, token, head * shape.D)
        T.buffer_store(work.peak, splat(LOWEST, lanes), [row, ramp(0, lanes)])
        T.buffer_store(work.total, splat(0.0, lanes), [row, ramp(0, lanes)])
        for v in range(shape.D // lanes):
            T.buffer_store(work.sums, splat(0.0, lanes), [ramp(work.row(row) + v * lanes, lanes)])


def _mask(work: Work, first: Expr, tokens: Expr, start: Expr, cell: Expr, end_cell: Expr) -> None:
    """Emit the lowest score for cells behind the last that a row sees; what is there may be NaN."""
    lanes = work.lanes
    with T.serial(work.live_rows) as row:
        last = work.shape.last_cell(start, work.shape.token(first, row, tokens), end_cell)
        limit = T.Bind(T.cast(last - cell, "int32"))
        for v in range(STEP // lanes):
            columns = ramp(v * lanes, lanes)
            is_seen = T.ramp(T.int32(v * lanes), 1, lanes) <= T.broadcast(limit, lanes)
            score = T.Select(is_seen, work.scores[row, columns], splat(LOWEST, lanes))
            T.buffer_store(work.scores, score, [row, columns])


def _soften(form: Form, work: Work, state: Expr, values: Expr, row: Expr) -> None:
    """Emit the online softmax of one row: its maximum, factor, weights and sum of weights."""
    isa, lanes, line = work.shape.isa, work.lanes, ramp(0, work.lanes)
    scores = [work.scores[row, ramp(v * lanes, lanes)] for v in range(STEP // lanes)]
    scores = [T.Bind(score) for score in scores]
    best = scores
    while len(best) > 1:
        best = [T.max(a, b) for a, b in zip(best[::2], best[1::2], strict=True)]
    old = T.Bind(work.peak[row, line])
    new = T.Bind(T.max(old, splat(T.ceil(largest(best[0], isa)), lanes)))
    factor = T.Bind(form.scale(isa, splat(1.0, lanes), old - new))
    weights = [power_of_two(form.scale, isa, score, new) for score in scores]
    total = form.pack_weights(work, state, values, row, weights, work.total[row, line] * factor)
    T.buffer_store(work.total, total, [row, line])
    T.buffer_store(work.peak, new, [row, line])
    T.buffer_store(work.factor, factor, [row, line])


def _finish(work: Work) -> None:
    """Emit the end of a task: each row's maximum and sum of weights, behind its sums."""
    with T.serial(work.live_rows) as row:
        at = T.Bind(work.row(row) + work.shape.D)
        T.buffer_store(work.sums, work.peak[row, 0], [at])
        T.buffer_store(work.sums, hsum(work.total[row, ramp(0, work.lanes)], work.lanes), [at + 1])


def largest(x: Expr, isa: Isa) -> Expr:
    """Return the largest lane, none of which should be NaN."""
    if isa.offers("max_f32"):
        return apply(isa, "max_f32", x)
    return hmax(x, isa.lanes)


def power_of_two(scale: Scale, isa: Isa, x: Expr, shift: Expr) -> Expr:
    """Return 2^(x - shift) for a whole shift: the mantissa does not depend on it. `scale` is that of a `Form`."""
    lanes = isa.lanes

    def split(x: Expr, whole: Expr) -> Expr:
        tail = let(x - whole, lambda f: horner(f, _POWER_TAIL, lanes) * f + splat(1.0, lanes))
        return scale(isa, tail, whole - shift)

    return let(x, lambda x: let(T.nearbyint(x), lambda whole: split(x, whole)))


def fetch_ahead(work: Work, state: Expr, at: Expr) -> None:
    """Emit a prefetch into L2 of the same place one step later, in decode, where lines come from memory.

    Measured: into L1, or with less distance than 4 KiB, it gains nothing; into L2, 40 % for groups of 8.
    """
    shape = work.shape
    if shape.query_tokens == 1:
        step_elements = STEP // CELLS * shape.cache.block_elements
        fetch(state[at + step_elements], 2)
