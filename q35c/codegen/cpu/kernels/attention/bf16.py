"""The inner part of attention for a cache of bf16 pairs: products by vdpbf16ps, scores in powers of two.

    s = q K^T * log2(e);   w = bf16(2^(s - m));   out = sum(w V) / sum(w)          (steps and m: pairs.py)

Scores come in register tiles of 8 rows x 32 cells, sums in tiles of 8 rows x W dims, from panels of 32 keys, 16 KiB,
and of W dims of the values, 4 KiB.

Accuracy: queries, keys, values and weights have 8 bits. Sums are f32 and the sum of weights is that of the rounded
ones, so a constant value comes out unchanged. Expect errors of 2^-9 of a typical |v|, divided by the root of how many
cells matter. vdpbf16ps treats denormals as zeros.

Bytes: 2 D elements of 2 bytes per cell and key head, per task. Limit: one vdpbf16ps a cycle in prefill; the read
bandwidth in decode, where lines are fetched a step before they are used.
"""

from __future__ import annotations

import math

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.apply import apply
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.attention.pairs import Form, Work, fetch_ahead
from q35c.codegen.cpu.kernels.vectors import Expr, ramp, splat
from q35c.layouts.cache import CELLS
from q35c.layouts.weights import ceil_div

_L = 16  # lanes; a vector of the cache has as many pairs
_PAIRS = CELLS // 2  # pairs of cells in a block
_ONES = 0x3F803F80  # a pair of bf16 ones


def _scale(isa: Isa, x: Expr, power: Expr) -> Expr:
    return apply(isa, "scale_f32", x, power)


def _pack_query(work: Work, q: Expr, row: Expr, token: Expr, column: Expr) -> None:
    """Emit the queries of a row times log2(e) as pairs."""
    for group in range(ceil_div(work.shape.D, 2 * _L)):
        at = column + group * (2 * _L)
        low, high = (q[token, ramp(at + half * _L, _L)] for half in range(2))
        if (group + 1) * 2 * _L > work.shape.D:
            high = splat(0.0, _L)
        log2e = splat(math.log2(math.e), _L)
        pairs = apply(work.shape.isa, "round2_bf16", low * log2e, high * log2e)
        T.buffer_store(work.queries, pairs, [row, ramp(group * _L, _L)])


def _multiply(work: Work, acc: Expr, words: list[Expr], scalars: list[Expr]) -> None:
    """Emit acc[r, j] += words[j] . scalars[r], over pairs."""
    words = [T.Bind(word) for word in words]
    for r, scalar in enumerate(scalars):
        wide = T.Bind(splat(scalar, _L))
        for j, word in enumerate(words):
            value = apply(work.shape.isa, "dot2_bf16", acc[r, j, ramp(0, _L)], word, wide)
            T.buffer_store(acc, value, [r, j, ramp(0, _L)])


def _score(work: Work, state: Expr, keys: Expr, blocks: Expr) -> None:
    """Emit scores[row, cell of the step] = q_row . k for the blocks that hold cells."""
    shape, vectors = work.shape, CELLS // _L
    with T.serial(blocks) as block:
        panel = T.Bind(keys + block * (shape.D // 2 * CELLS))
        with T.serial(work.live_tiles) as tile:
            acc = work.tile(vectors, "float32")
            rows = [T.Bind(tile * shape.tile_rows + r) for r in range(shape.tile_rows)]
            for r in range(shape.tile_rows):
                for j in range(vectors):
                    T.buffer_store(acc, splat(0.0, _L), [r, j, ramp(0, _L)])
            with T.serial(T.int64(shape.D // 2)) as pair:
                at = T.Bind(panel + pair * CELLS)
                for j in range(vectors):
                    fetch_ahead(work, state, at + j * _L)
                words = [state[ramp(at + j * _L, _L)] for j in range(vectors)]
                _multiply(work, acc, words, [work.queries[row, pair] for row in rows])
            for r, row in enumerate(rows):
                for j in range(vectors):
                    columns = ramp(block * CELLS + j * _L, _L)
                    T.buffer_store(work.scores, acc[r, j, ramp(0, _L)], [row, columns])


def _pack_weights(
    work: Work, state: Expr, values: Expr, row: Expr, weights: list[Expr], total: Expr
) -> Expr:
    """Emit a step's weights as pairs; return the sum of the rounded ones added to `total`."""
    isa = work.shape.isa
    for v in range(0, len(weights), 2):
        pairs = T.Bind(apply(isa, "round2_bf16", weights[v], weights[v + 1]))
        T.buffer_store(work.weights, pairs, [row, ramp(v * (_L // 2), _L)])
        total = apply(isa, "dot2_bf16", total, pairs, T.broadcast(T.int32(_ONES), _L))
    return total


def _add_values(work: Work, state: Expr, values: Expr, blocks: Expr, cells: Expr) -> None:
    """Emit sums = sums * factor + weights V, over all dims; pairs without a cell are not read."""
    shape, width = work.shape, work.shape.value_width
    with T.serial(T.int64(shape.D // width)) as group, T.serial(work.live_tiles) as tile:
        acc = work.tile(width // _L, "float32")
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
                for j in range(width // _L):
                    fetch_ahead(work, state, at + j * _L)
                words = [state[ramp(at + j * _L, _L)] for j in range(width // _L)]
                column = block * _PAIRS + pair
                _multiply(work, acc, words, [work.weights[row, column] for row in rows])
        for r, place in enumerate(places):
            for j in range(width // _L):
                T.buffer_store(work.sums, acc[r, j, ramp(0, _L)], [ramp(place + j * _L, _L)])


BF16 = Form(_pack_query, _score, _scale, _pack_weights, _add_values)
