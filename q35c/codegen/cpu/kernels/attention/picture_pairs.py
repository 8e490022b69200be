"""Attention to all by products of bf16 pairs: what picture.py does where the instruction set has them.

    s = q K^T * log2(e);   w = bf16(2^(s - m)), m whole and >= every s so far;   out = sum(w V) / sum(w)

A task is ROWS patches of one head. Per step of 64 cells each tile of HEIGHT rows makes its scores, its weights and its sums
before the next begins: keys and values of a step, 16 KiB for 64 dims, serve all tiles of the task from L1, and what a tile
makes of them stays in registers and a few lines. A tile of 6 rows x 4 vectors needs 10 loads for 24 products. Heads with more
vectors of dims add their values up in parts of up to four.

The cells of a head lie step by step, keys before values, in words of two bf16:

    keys     [D / 2, 64 cells, 2 dims]
    values   [32 pairs of cells, D, 2 cells]

Accuracy, and why no bit depends on the rows beside a row: pairs.py and bf16.py, whose steps these are.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.apply import apply
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.attention.pairs import largest, power_of_two
from q35c.codegen.cpu.kernels.attention.shape import LOWEST
from q35c.codegen.cpu.kernels.vectors import STACK, Expr, hsum, narrow, ramp, splat
from q35c.layouts.weights import ceil_div

CELLS = 64  # of a step
HEIGHT, ROWS = 6, 48  # of a tile, of a task
_L = 16  # lanes
_MOST_VECTORS = 4  # of dims that a tile adds up at once
_ONES = 0x3F803F80  # a pair of bf16 ones


@dataclass(frozen=True)
class PairedPicture:
    """Describe attention of heads of D dims, a multiple of 16, to up to `cells` cells, a multiple of 64."""

    D: int
    cells: int
    isa: Isa

    @property
    def step_words(self) -> int:
        """Words of a step's keys, and of its values."""
        return self.D * CELLS // 2

    @property
    def head_words(self) -> int:
        return self.cells * self.D

    @property
    def row_words(self) -> int:
        """Scratch of one row: its D sums, then the maximum, the sum of weights and the factor, a vector each."""
        return self.D + 3 * _L

    @property
    def task_words(self) -> int:
        return ROWS * self.row_words

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Return first vector and number of the vectors of dims that are added up at once."""
        vectors = self.D // _L
        count = ceil_div(vectors, _MOST_VECTORS)
        bounds = [vectors * i // count for i in range(count + 1)]
        return [(first, last - first) for first, last in itertools.pairwise(bounds)]


@T.inline
def store_cell(paired, state, h, cell, is_last, key, value):
    """Write the key f32 [D] and the value f32 [1, D] of one cell, as halves of words.

    An even cell shares its values' words with the next one. If there is none, that is made zero: attention multiplies what
    is there, though by a weight of zero.
    """
    D, L = T.meta_var(paired.D), T.meta_var(16)
    step: T.let[T.int64] = T.truncdiv(cell, T.int64(CELLS))
    lane: T.let[T.int64] = cell - step * CELLS
    keys: T.let[T.int64] = h * (2 * paired.head_words) + step * (4 * paired.step_words) + lane * 2
    values: T.let[T.int64] = (
        h * (2 * paired.head_words)
        + step * (4 * paired.step_words)
        + 2 * paired.step_words
        + T.shift_right(lane, T.int64(1)) * (2 * D)
        + T.bitwise_and(lane, T.int64(1))
    )
    halves = T.alloc_buffer((D,), "uint16", annotations=STACK)
    for i in T.serial(D // L):
        halves[ramp(i * L, L)] = narrow(key[ramp(i * L, L)], L)
    for pair in T.serial(D // 2):
        state[ramp(keys + pair * (2 * CELLS), 2)] = halves[ramp(pair * 2, 2)]
    for i in T.serial(D // L):
        halves[ramp(i * L, L)] = narrow(value[0, ramp(i * L, L)], L)
    for d in T.serial(D):
        state[values + d * 2] = halves[d]
    if is_last and T.bitwise_and(lane, T.int64(1)) == 0:
        for d in T.serial(D):
            state[values + d * 2 + 1] = T.uint16(0)


@dataclass(frozen=True)
class _Task:
    """Hold a task's buffers: queries of its rows, scores, weights and factors of one tile; sums lie in the scratch."""

    paired: PairedPicture
    queries: Expr  # int32 [ROWS, D / 2 in whole vectors]
    scores: Expr  # f32 [HEIGHT, CELLS]
    weights: Expr  # int32 [HEIGHT, CELLS / 2]
    sums: Expr
    at: Expr

    @property
    def isa(self) -> Isa:
        return self.paired.isa

    def row(self, row: Expr) -> Expr:
        """Return where a row's sums begin."""
        return self.at + row * self.paired.row_words

    def peak(self, row: Expr, number: int) -> Expr:
        """Return the place of the row's maximum (0), sum of weights (1) or factor (2)."""
        return ramp(self.row(row) + self.paired.D + number * _L, _L)


def attend_to_all(
    paired: PairedPicture, q: Expr, state: Expr, h: Expr, first: Expr, tokens: Expr, sums: Expr, at: Expr
) -> None:  # fmt: skip
    """Emit a task: rows first.. of head h attend to `tokens` cells; rows beyond the last repeat it.

    Row r leaves its D sums at `at` + r * row_words in `sums`, the sum of weights in lane 0 behind them.
    """

    def local(rows: int, columns: int, dtype: str) -> Expr:
        return T.alloc_buffer((rows, columns), dtype, annotations=STACK)

    columns = ceil_div(paired.D, 2 * _L) * _L
    task = _Task(
        paired, local(ROWS, columns, "int32"), local(HEIGHT, CELLS, "float32"), local(HEIGHT, CELLS // 2, "int32"), sums, at
    )  # fmt: skip
    live = T.Bind(T.min(tokens - first, T.int64(ROWS)))
    tiles = T.Bind(T.truncdiv(live + (HEIGHT - 1), T.int64(HEIGHT)))
    with T.serial(tiles * HEIGHT) as row:
        _begin(task, q, row, T.Bind(T.min(first + row, tokens - 1)), h)
    with T.serial(T.truncdiv(tokens + (CELLS - 1), T.int64(CELLS))) as step:
        keys = T.Bind(h * paired.head_words + step * (2 * paired.step_words))
        cells = T.Bind(T.min(tokens - step * CELLS, T.int64(CELLS)))
        with T.serial(tiles) as tile:
            top = T.Bind(tile * HEIGHT)
            _score(task, state, keys, top)
            with T.If(cells < CELLS), T.Then():
                _mask(task, T.Bind(T.cast(cells, "int32")))
            with T.serial(T.int64(HEIGHT)) as r:
                _soften(task, r, top + r)
            for part in paired.parts:
                _add_values(task, state, keys + paired.step_words, cells, top, *part)


def _begin(task: _Task, q: Expr, row: Expr, token: Expr, h: Expr) -> None:
    """Emit the start of a row: its queries times log2(e) in pairs, no sums yet, the lowest maximum."""
    paired = task.paired
    for group in range(ceil_div(paired.D, 2 * _L)):
        at = h * paired.D + group * (2 * _L)
        low, high = (q[token, ramp(at + half * _L, _L)] for half in range(2))
        if (group + 1) * 2 * _L > paired.D:
            high = splat(0.0, _L)
        log2e = splat(math.log2(math.e), _L)
        pairs = apply(task.isa, "round2_bf16", low * log2e, high * log2e)
        T.buffer_store(task.queries, pairs, [row, ramp(group * _L, _L)])
    for vector in range(paired.D // _L):
        T.buffer_store(task.sums, splat(0.0, _L), [ramp(task.row(row) + vector * _L, _L)])
    T.buffer_store(task.sums, splat(LOWEST, _L), [task.peak(row, 0)])
    T.buffer_store(task.sums, splat(0.0, _L), [task.peak(row, 1)])


def _score(task: _Task, state: Expr, keys: Expr, top: Expr) -> None:
    """Emit scores = q . k of a tile's rows and a step's cells."""
    vectors = CELLS // _L
    acc = T.alloc_buffer((HEIGHT, vectors, _L), "float32", annotations=STACK)
    rows = [T.Bind(top + r) for r in range(HEIGHT)]
    for r in range(HEIGHT):
        for j in range(vectors):
            T.buffer_store(acc, splat(0.0, _L), [r, j, ramp(0, _L)])
    with T.serial(T.int64(task.paired.D // 2)) as pair:
        at = T.Bind(keys + pair * CELLS)
        words = [state[ramp(at + j * _L, _L)] for j in range(vectors)]
        _multiply(task, acc, words, [task.queries[row, pair] for row in rows])
    for r in range(HEIGHT):
        for j in range(vectors):
            T.buffer_store(task.scores, acc[r, j, ramp(0, _L)], [r, ramp(j * _L, _L)])


def _multiply(task: _Task, acc: Expr, words: list[Expr], scalars: list[Expr]) -> None:
    """Emit acc[r, j] += words[j] . scalars[r], over pairs."""
    words = [T.Bind(word) for word in words]
    for r, scalar in enumerate(scalars):
        wide = T.Bind(splat(scalar, _L))
        for j, word in enumerate(words):
            value = apply(task.isa, "dot2_bf16", acc[r, j, ramp(0, _L)], word, wide)
            T.buffer_store(acc, value, [r, j, ramp(0, _L)])


def _mask(task: _Task, cells: Expr) -> None:
    """Emit the lowest score for cells behind the last; what is there may be NaN."""
    with T.serial(T.int64(HEIGHT)) as r:
        for j in range(CELLS // _L):
            columns = ramp(j * _L, _L)
            is_seen = T.ramp(T.int32(j * _L), 1, _L) < T.broadcast(cells, _L)
            score = T.Select(is_seen, task.scores[r, columns], splat(LOWEST, _L))
            T.buffer_store(task.scores, score, [r, columns])


def _soften(task: _Task, r: Expr, row: Expr) -> None:
    """Emit the online softmax of one row: its maximum, factor, weights in pairs, and sum of weights."""
    isa = task.isa
    scores = [T.Bind(task.scores[r, ramp(j * _L, _L)]) for j in range(CELLS // _L)]
    best = scores
    while len(best) > 1:
        best = [T.max(a, b) for a, b in zip(best[::2], best[1::2], strict=True)]
    old = T.Bind(task.sums[task.peak(row, 0)])
    new = T.Bind(T.max(old, splat(T.ceil(largest(best[0], isa)), _L)))
    factor = T.Bind(apply(isa, "scale_f32", splat(1.0, _L), old - new))
    total = task.sums[task.peak(row, 1)] * factor
    for j in range(0, len(scores), 2):
        low, high = (power_of_two(_scale, isa, scores[j + i], new) for i in range(2))
        pairs = T.Bind(apply(isa, "round2_bf16", low, high))
        T.buffer_store(task.weights, pairs, [r, ramp(j * (_L // 2), _L)])
        total = apply(isa, "dot2_bf16", total, pairs, T.broadcast(T.int32(_ONES), _L))
    T.buffer_store(task.sums, total, [task.peak(row, 1)])
    T.buffer_store(task.sums, new, [task.peak(row, 0)])
    T.buffer_store(task.sums, factor, [task.peak(row, 2)])


def _scale(isa: Isa, x: Expr, power: Expr) -> Expr:
    return apply(isa, "scale_f32", x, power)


def _add_values(
    task: _Task, state: Expr, values: Expr, cells: Expr, top: Expr, first: int, vectors: int
) -> None:
    """Emit sums = sums * factor + weights V for a tile and some vectors of dims; pairs without a cell are not read."""
    acc = T.alloc_buffer((HEIGHT, vectors, _L), "float32", annotations=STACK)
    places = [T.Bind(task.row(top + r) + first * _L) for r in range(HEIGHT)]
    for r, place in enumerate(places):
        factor = T.Bind(task.sums[task.peak(top + r, 2)])
        for j in range(vectors):
            value = task.sums[ramp(place + j * _L, _L)] * factor
            T.buffer_store(acc, value, [r, j, ramp(0, _L)])
    with T.serial(T.truncdiv(cells + 1, T.int64(2))) as pair:
        at = T.Bind(values + pair * task.paired.D + first * _L)
        words = [state[ramp(at + j * _L, _L)] for j in range(vectors)]
        _multiply(task, acc, words, [task.weights[r, pair] for r in range(HEIGHT)])
    for r, place in enumerate(places):
        for j in range(vectors):
            T.buffer_store(task.sums, acc[r, j, ramp(0, _L)], [ramp(place + j * _L, _L)])


def inverse_of_row(paired: PairedPicture, sums: Expr, at: Expr) -> Expr:
    """Return one divided by the sum of a row's weights."""
    total = sums[ramp(at + paired.D + _L, _L)]
    return T.float32(1) / hsum(total, _L)
