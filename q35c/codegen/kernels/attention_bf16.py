"""The inner part of attention for a cache of bf16 pairs: products by vdpbf16ps, softmax to the base of 2.

    s = q K^T * log2(e);   w = bf16(2^(s - m)), m whole and >= every s so far;   out = sum(w V) / sum(w)

Per step of 64 cells, for all rows of a task: scores in register tiles of 8 rows x 32 cells, the weights, then the
sums in tiles of 8 rows x W dims. Panels (32 keys, 16 KiB; W dims of the values, 4 KiB) are the outer loops, so that
each comes into L1 once for up to 64 rows; blocks behind the last token are left out, and only steps that reach past
the first token are masked.

Since m is whole, a new maximum multiplies old sums by a power of two and no weight rounds differently: a row's result
depends on the order of its sums alone, neither on the rows beside it nor on where a prompt or the context was cut.

Accuracy: queries, keys, values and weights have 8 bits. Sums are f32 and the sum of weights is that of the rounded
ones, so a constant value comes out unchanged. Expect errors of 2^-9 of a typical |v|, divided by the root of how many
cells matter. vdpbf16ps treats denormals as zeros.

Bytes: 2 D elements of 2 bytes per cell and key head, per task. Limit: one vdpbf16ps a cycle in prefill; the read
bandwidth in decode, where lines are fetched a step before they are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.kernels.attention_shape import CELLS, AttentionShape
from q35c.codegen.kernels.common import (
    STACK,
    Expr,
    ceil_div,
    from_bits,
    horner,
    hsum,
    let,
    ramp,
    splat,
)

LOWEST = -1e30  # below any score; a real -inf would make NaN of inf - inf
_L = 16  # lanes; a vector of the cache has as many pairs
_PAIRS = CELLS // 2  # pairs of cells in a block
_ONES = 0x3F803F80  # a pair of bf16 ones
# 2^f = 1 + f * tail(f) on |f| <= 1/2; minimax, relative error 3e-6: a 700th of the rounding that follows.
_POWER_TAIL = (0.009582852944731712, 0.055906426161527634, 0.24024099111557007, 0.6931241750717163)


def dot_pairs(sums: Expr, a: Expr, b: Expr) -> Expr:
    """Return sums + a.low * b.low + a.high * b.high of int32 lanes that hold bf16 pairs."""
    return T.call_pure_extern("float32x16", "q35c_dpbf16", sums, a, b)


def pack_pairs(low: Expr, high: Expr) -> Expr:
    """Round 32 consecutive f32, given as two vectors, to 16 bf16 pairs."""
    return T.call_pure_extern("int32x16", "q35c_pack_bf16", low, high)


def scale_by_power(x: Expr, power: Expr) -> Expr:
    """Return x * 2^power for whole powers; what is too small becomes 0, NaN stays NaN."""
    return T.call_pure_extern("float32x16", "q35c_scale_f32x16", x, power)


def largest(x: Expr) -> Expr:
    """Return the largest of 16 lanes, none of which should be NaN."""
    return T.call_pure_extern("float32", "q35c_max_f32x16", x)


def power_of_two(x: Expr, shift: Expr) -> Expr:
    """Return 2^(x - shift) for a whole shift: the mantissa does not depend on it."""

    def split(x: Expr, whole: Expr) -> Expr:
        mantissa = let(x - whole, lambda f: horner(f, _POWER_TAIL, _L) * f + splat(1.0, _L))
        return scale_by_power(mantissa, whole - shift)

    return let(x, lambda x: let(T.nearbyint(x), lambda whole: split(x, whole)))


def whole_power(x: Expr) -> Expr:
    """Return 2^x of a whole scalar x <= 0; what is too small becomes 0."""
    word = (T.cast(T.max(x, T.float32(-127)), "int32") + T.int32(127)) << T.int32(23)
    return from_bits(word, 1)


@dataclass(frozen=True)
class Work:
    """Hold one task's buffers: a row's queries, scores, weights, maximum, factor and sum of weights, and its sums.

    `sums` f32 is the kernel's scratch, where row r begins at `at` + r * row_words; the others are local.
    """

    shape: AttentionShape
    queries: Expr  # int32 [rows, D / 2]
    scores: Expr  # f32 [rows, STEP]
    weights: Expr  # int32 [rows, STEP / 2]
    peak: Expr  # f32 [rows, 16], 16 times the same
    factor: Expr  # likewise: 2^(old maximum - new maximum)
    total: Expr  # f32 [rows, 16], to be added up
    sums: Expr
    at: Expr
    live_tiles: Expr

    @staticmethod
    def make(shape: AttentionShape, sums: Expr, at: Expr, live_tokens: Expr) -> Work:
        """Allocate the local buffers: 0.9 KiB a row for head dim 256."""
        rows = shape.tiles * shape.tile_rows

        def local(columns: int, dtype: str) -> Expr:
            return T.alloc_buffer((rows, columns), dtype, annotations=STACK)

        columns = ceil_div(shape.D, 2 * _L) * _L
        tiles = T.Bind(T.truncdiv(live_tokens * shape.group + (shape.tile_rows - 1), shape.tile_rows))  # fmt: skip
        return Work(
            shape, local(columns, "int32"), local(shape.step, "float32"),
            local(shape.step // 2, "int32"), local(_L, "float32"), local(_L, "float32"),
            local(_L, "float32"), sums, at, tiles,
        )  # fmt: skip

    @property
    def live_rows(self) -> Expr:
        return self.live_tiles * self.shape.tile_rows

    def row(self, row: Expr) -> Expr:
        """Return where a row's sums begin."""
        return self.at + row * self.shape.row_words

    def token(self, first: Expr, row: Expr, tokens: Expr) -> Expr:
        """Return the token of a row; rows beyond the last token repeat it."""
        return T.min(first + T.truncdiv(row, T.int64(self.shape.group)), tokens - 1)


def attend_paired(
    shape: AttentionShape, q: Expr, state: Expr, base: Expr, kv_head: Expr, first: Expr, tokens: Expr,
    start: Expr, first_step: Expr, end_step: Expr, end_cell: Expr, sums: Expr, at: Expr,
) -> None:  # fmt: skip
    """Emit what `attention.attend` does, for steps first_step..end_step of 64 cells before end_cell."""
    live_tokens = T.Bind(T.min(tokens - first, T.int64(shape.query_tokens)))
    work = Work.make(shape, sums, at, live_tokens)
    base = T.Bind(base)
    with T.If(end_step > first_step):
        with T.Then():
            _pack_queries(work, q, first, kv_head, tokens)
            with T.serial(end_step - first_step) as i:
                cell = T.Bind((first_step + i) * shape.step)
                blocks = T.Bind(T.min(T.truncdiv(end_cell - cell + (CELLS - 1), CELLS), T.int64(shape.step // CELLS)))  # fmt: skip
                block = T.Bind(T.truncdiv(cell, CELLS))
                _score(work, state, shape.cache.key(base, kv_head, block), blocks)
                with T.If(cell + (shape.step - 1) > start + first), T.Then():
                    _mask(work, first, tokens, start, cell)
                with T.serial(work.live_rows) as row:
                    _soften(work, row)
                value = shape.cache.value(base, kv_head, cell)
                _add_values(work, state, value, blocks, end_cell - cell)
            _finish(work)
        with T.Else(), T.serial(work.live_rows) as row:
            T.buffer_store(sums, T.float32(LOWEST), [work.row(row) + shape.D])


def _pack_queries(work: Work, q: Expr, first: Expr, kv_head: Expr, tokens: Expr) -> None:
    """Emit the start of a task: queries times log2(e) as pairs, no sums yet, the lowest maximum."""
    shape = work.shape
    with T.serial(work.live_rows) as row:
        token = T.Bind(work.token(first, row, tokens))
        head = T.Bind(kv_head * shape.group + T.truncmod(row, T.int64(shape.group)))
        for group in range(ceil_div(shape.D, 2 * _L)):
            column = head * shape.D + group * (2 * _L)
            low, high = (q[token, ramp(column + half * _L, _L)] for half in range(2))
            if (group + 1) * 2 * _L > shape.D:
                high = splat(0.0, _L)
            log2e = splat(math.log2(math.e), _L)
            T.buffer_store(
                work.queries, pack_pairs(low * log2e, high * log2e), [row, ramp(group * _L, _L)]
            )
        T.buffer_store(work.peak, splat(LOWEST, _L), [row, ramp(0, _L)])
        T.buffer_store(work.total, splat(0.0, _L), [row, ramp(0, _L)])
        for v in range(shape.D // _L):
            T.buffer_store(work.sums, splat(0.0, _L), [ramp(work.row(row) + v * _L, _L)])


def _tile(work: Work, vectors: int) -> Expr:
    return T.alloc_buffer((work.shape.tile_rows, vectors, _L), "float32", annotations=STACK)


def _multiply(acc: Expr, words: list[Expr], scalars: list[Expr]) -> None:
    """Emit acc[r, j] += words[j] . scalars[r], over pairs."""
    words = [T.Bind(word) for word in words]
    for r, scalar in enumerate(scalars):
        wide = T.Bind(splat(scalar, _L))
        for j, word in enumerate(words):
            value = dot_pairs(acc[r, j, ramp(0, _L)], word, wide)
            T.buffer_store(acc, value, [r, j, ramp(0, _L)])


def _score(work: Work, state: Expr, keys: Expr, blocks: Expr) -> None:
    """Emit scores[row, cell of the step] = q_row . k for the blocks that hold cells."""
    shape, vectors = work.shape, CELLS // _L
    with T.serial(blocks) as block:
        panel = T.Bind(keys + block * (shape.D // 2 * CELLS))
        with T.serial(work.live_tiles) as tile:
            acc = _tile(work, vectors)
            rows = [T.Bind(tile * shape.tile_rows + r) for r in range(shape.tile_rows)]
            for r in range(shape.tile_rows):
                for j in range(vectors):
                    T.buffer_store(acc, splat(0.0, _L), [r, j, ramp(0, _L)])
            with T.serial(T.int64(shape.D // 2)) as pair:
                at = T.Bind(panel + pair * CELLS)
                _fetch(work, state, at, vectors)
                words = [state[ramp(at + j * _L, _L)] for j in range(vectors)]
                _multiply(acc, words, [work.queries[row, pair] for row in rows])
            for r, row in enumerate(rows):
                for j in range(vectors):
                    columns = ramp(block * CELLS + j * _L, _L)
                    T.buffer_store(work.scores, acc[r, j, ramp(0, _L)], [row, columns])


def _fetch(work: Work, state: Expr, at: Expr, vectors: int) -> None:
    """Emit a prefetch into L2 of the same place one step later, in decode, where lines come from memory.

    Measured: into L1, or with less distance than 4 KiB, it gains nothing; into L2, 40 % for groups of 8.
    """
    if work.shape.query_tokens == 1:
        step_words = work.shape.step * work.shape.D // 2
        for j in range(vectors):
            address = T.address_of(state[at + (step_words + j * _L)])
            T.evaluate(T.call_extern("int32", "q35c_prefetch_l2", address))


def _mask(work: Work, first: Expr, tokens: Expr, start: Expr, cell: Expr) -> None:
    """Emit the lowest score for cells behind a row's own; what is there may be NaN."""
    with T.serial(work.live_rows) as row:
        limit = T.Bind(T.cast(start + work.token(first, row, tokens) - cell, "int32"))
        for v in range(work.shape.step // _L):
            columns = ramp(v * _L, _L)
            is_seen = T.ramp(T.int32(v * _L), 1, _L) <= T.broadcast(limit, _L)
            score = T.Select(is_seen, work.scores[row, columns], splat(LOWEST, _L))
            T.buffer_store(work.scores, score, [row, columns])


def _soften(work: Work, row: Expr) -> None:
    """Emit the online softmax of one row: its maximum, factor, weights and sum of weights."""
    lanes = ramp(0, _L)
    scores = [work.scores[row, ramp(v * _L, _L)] for v in range(work.shape.step // _L)]
    scores = [T.Bind(score) for score in scores]
    best = scores
    while len(best) > 1:
        best = [T.max(a, b) for a, b in zip(best[::2], best[1::2], strict=True)]
    old = T.Bind(work.peak[row, lanes])
    new = T.Bind(T.max(old, splat(T.ceil(largest(best[0])), _L)))
    factor = T.Bind(scale_by_power(splat(1.0, _L), old - new))
    total = work.total[row, lanes] * factor
    for v in range(0, len(scores), 2):
        low, high = (power_of_two(score, new) for score in scores[v : v + 2])
        pairs = T.Bind(pack_pairs(low, high))
        T.buffer_store(work.weights, pairs, [row, ramp(v * (_L // 2), _L)])
        total = dot_pairs(total, pairs, T.broadcast(T.int32(_ONES), _L))
    T.buffer_store(work.total, total, [row, lanes])
    T.buffer_store(work.peak, new, [row, lanes])
    T.buffer_store(work.factor, factor, [row, lanes])


def _add_values(work: Work, state: Expr, values: Expr, blocks: Expr, cells: Expr) -> None:
    """Emit sums = sums * factor + weights V, over all dims; pairs without a cell are not read."""
    shape, width = work.shape, work.shape.value_width
    with T.serial(T.int64(shape.D // width)) as group, T.serial(work.live_tiles) as tile:
        acc = _tile(work, width // _L)
        rows = [T.Bind(tile * shape.tile_rows + r) for r in range(shape.tile_rows)]
        places = [T.Bind(work.row(row) + group * width) for row in rows]
        for r, row in enumerate(rows):
            factor = T.Bind(work.factor[row, ramp(0, _L)])
            for j in range(width // _L):
                value = work.sums[ramp(places[r] + j * _L, _L)] * factor
                T.buffer_store(acc, value, [r, j, ramp(0, _L)])
        with T.serial(blocks) as block:
            panel = T.Bind(values + block * (shape.D * _PAIRS) + group * (_PAIRS * width))
            left = T.truncdiv(cells - block * CELLS + 1, 2)
            with T.serial(T.min(left, T.int64(_PAIRS))) as pair:
                at = T.Bind(panel + pair * width)
                _fetch(work, state, at, width // _L)
                words = [state[ramp(at + j * _L, _L)] for j in range(width // _L)]
                column = block * _PAIRS + pair
                _multiply(acc, words, [work.weights[row, column] for row in rows])
        for r, place in enumerate(places):
            for j in range(width // _L):
                T.buffer_store(work.sums, acc[r, j, ramp(0, _L)], [ramp(place + j * _L, _L)])


def _finish(work: Work) -> None:
    """Emit the end of a task: each row's maximum and sum of weights, behind its sums."""
    with T.serial(work.live_rows) as row:
        at = T.Bind(work.row(row) + work.shape.D)
        T.buffer_store(work.sums, work.peak[row, 0], [at])
        T.buffer_store(work.sums, hsum(work.total[row, ramp(0, _L)], _L), [at + 1])
