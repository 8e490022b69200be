"""The inner part of attention for an int8 cache: exact products of 16-bit integers, by vpdpwssd or vpmaddwd.

    s = (Q K^T) * query scale * key scales;   W = integer(2^(s - m) * value scales);   out = sum(W V) / sum(2^(s - m))

Keys and values stay as they are stored: bytes are widened to 16 bits when they are loaded, and what they meet is
rounded to 15 bits and a sign: a row's queries with one scale, its weights with one for each step of 64 cells, after each
weight took the scale of its cell's value. Integer sums are exact, and small enough for 32 bits: D * 127 * 32767 < 2^31.
Steps, masks and m are those of pairs.py; a step's rounding does not depend on m, which is a power of two.

Accuracy: that of keys and values; queries and weights are off by 2^-16 of their largest.

Bytes: 2 (D + 4) per cell and key head, per task. Limit: one vpdpwssd a cycle in prefill, as many operations as bf16
products do; the read bandwidth in decode, where a group of 4 query heads takes about 10 cycles for 64 bytes.
"""

from __future__ import annotations

import math

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.apply import apply
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.attention.pairs import Form, Work, fetch_ahead, whole_power
from q35c.codegen.cpu.kernels.attention.shape import cell_scale
from q35c.codegen.cpu.kernels.vectors import (
    Expr,
    largest_magnitude,
    nearest,
    ramp,
    splat,
    splat_int,
)
from q35c.layouts.cache import CELLS

_PAIRS = CELLS // 2  # pairs of cells in a block
_VECTORS = 2  # vectors of a register tile, in cells or in dims
_LEAST_LANES = 8  # half of the least head dim
_QUERY, _WEIGHTS = 0, 1  # places in a row's scales
_TOP = 32767.0  # of the 16-bit integers
_TINY = 1e-30  # what is smaller rounds to 0: its reciprocal would be infinite


def _scale(isa: Isa, x: Expr, power: Expr) -> Expr:
    return x * whole_power(power, isa.lanes)


def _pack(low: Expr, high: Expr, lanes: int) -> Expr:
    """Return words of the nearest integers of two vectors."""
    low, high = nearest(low, lanes), nearest(high, lanes)
    return (low & splat_int(0xFFFF, lanes)) | (high << splat_int(16, lanes))


def _reciprocal(work: Work, vectors: list[Expr], row: Expr, place: int, unit: float) -> Expr:
    """Emit the scale, times `unit`, with which a row's vectors become integers; return what to multiply them by.

    What is not finite makes the scale so, and by it the row's results.
    """
    top = T.Bind(T.max(T.float32(_TINY), largest_magnitude(vectors, work.lanes)))
    T.buffer_store(work.scales, top * T.float32(unit / _TOP), [row, place])
    return T.Bind(T.float32(_TOP) / top)


def _pack_query(work: Work, q: Expr, row: Expr, token: Expr, column: Expr) -> None:
    """Emit the queries of a row as words of dims d and d + D / 2; their scale has log2(e) in it."""
    half, lanes = work.shape.D // 2, work.lanes
    vectors = [q[token, ramp(column + d, lanes)] for d in range(0, work.shape.D, lanes)]
    factor = _reciprocal(work, vectors, row, _QUERY, math.log2(math.e))
    lanes = lanes if half % lanes == 0 else _LEAST_LANES
    for d in range(0, half, lanes):
        low, high = (
            q[token, ramp(column + at, lanes)] * splat(factor, lanes) for at in (d, half + d)
        )
        T.buffer_store(work.queries, _pack(low, high, lanes), [row, ramp(d, lanes)])


def _multiply(work: Work, acc: Expr, state: Expr, at: Expr, scalars: list[Expr]) -> None:
    """Emit acc[r, j] += bytes at vector j . scalars[r], over pairs."""
    isa, lanes, vectors = work.shape.isa, work.lanes, int(acc.shape[1])
    fetch_ahead(work, state, at)  # the vectors lie in one line
    wide = [T.Bind(T.cast(state[ramp(at + j * (2 * lanes), 2 * lanes)], f"int16x{2 * lanes}")) for j in range(vectors)]  # fmt: skip
    for r, scalar in enumerate(scalars):
        pair = T.Bind(T.reinterpret(splat(scalar, lanes), dtype=f"int16x{2 * lanes}"))
        for j, words in enumerate(wide):
            # LLVM makes one instruction of product and sum where there is vpdpwssd.
            value = acc[r, j, ramp(0, lanes)] + apply(isa, "dot2_s16", words, pair)
            T.buffer_store(acc, value, [r, j, ramp(0, lanes)])


def _tile(work: Work, vectors: int) -> Expr:
    """Return a register tile of zeros."""
    acc = work.tile(vectors, "int32")
    for r in range(work.shape.tile_rows):
        for j in range(vectors):
            T.buffer_store(acc, splat_int(0, work.lanes), [r, j, ramp(0, work.lanes)])
    return acc


def _scales(work: Work, state: Expr, block: Expr, cell: int) -> Expr:
    """Load the scales of a vector of a block's cells, from `cell` on."""
    at = block + cell_scale(work.shape.D, cell)
    return T.reinterpret(state[ramp(at, 4 * work.lanes)], dtype=f"float32x{work.lanes}")


def _score(work: Work, state: Expr, keys: Expr, blocks: Expr) -> None:
    shape, lanes, vectors = work.shape, work.lanes, _VECTORS
    with T.serial(blocks) as block, T.serial(work.live_tiles) as tile:
        panel = T.Bind(keys + block * shape.cache.block_elements)
        rows = [T.Bind(tile * shape.tile_rows + r) for r in range(shape.tile_rows)]
        for cell in range(0, CELLS, vectors * lanes):
            acc = _tile(work, vectors)
            with T.serial(T.int64(shape.D // 2)) as pair:
                at = T.Bind(panel + pair * (2 * CELLS) + 2 * cell)
                _multiply(work, acc, state, at, [work.queries[row, pair] for row in rows])
            for j in range(vectors):
                first = cell + j * lanes
                scales = T.Bind(_scales(work, state, panel, first))
                for r, row in enumerate(rows):
                    exact = T.cast(acc[r, j, ramp(0, lanes)], f"float32x{lanes}")
                    score = exact * (scales * splat(work.scales[row, _QUERY], lanes))
                    T.buffer_store(work.scores, score, [row, ramp(block * CELLS + first, lanes)])


def _pack_weights(
    work: Work, state: Expr, values: Expr, row: Expr, weights: list[Expr], total: Expr
) -> Expr:
    """Emit a step's weights times their values' scales as words of cells p and p + 16 of each block."""
    lanes, zero = work.lanes, splat(0.0, work.lanes)
    scaled: list[Expr] = []
    for v, weight in enumerate(weights):
        weight = T.Bind(weight)
        total = total + weight
        block, cell = divmod(v * lanes, CELLS)
        scales = _scales(work, state, values + block * work.shape.cache.block_elements, cell)
        # The scale of a cell that was never written may be anything.
        scaled.append(T.Bind(T.Select(weight > zero, weight * scales, zero)))
    factor = splat(_reciprocal(work, scaled, row, _WEIGHTS, 1.0), lanes)
    ahead = _PAIRS // lanes  # vectors from a cell to the one that it is paired with
    for v in range(0, len(scaled), 2 * ahead):
        for i in range(v, v + ahead):
            words = _pack(scaled[i] * factor, scaled[i + ahead] * factor, lanes)
            T.buffer_store(work.weights, words, [row, ramp((v // 2 + i - v) * lanes, lanes)])
    return total


def _add_values(work: Work, state: Expr, values: Expr, blocks: Expr, cells: Expr) -> None:
    shape, lanes, width = work.shape, work.lanes, work.shape.value_width
    vectors = min(_VECTORS, width // lanes)
    with T.serial(T.int64(shape.D // width)) as group, T.serial(work.live_tiles) as tile:
        rows = [T.Bind(tile * shape.tile_rows + r) for r in range(shape.tile_rows)]
        for part in range(0, width, vectors * lanes):
            acc = _tile(work, vectors)
            with T.serial(blocks) as block:
                panel = values + block * shape.cache.block_elements + group * (CELLS * width)
                panel = T.Bind(panel + 2 * part)
                with T.serial(T.min(cells - block * CELLS, T.int64(_PAIRS))) as pair:
                    column = block * _PAIRS + pair
                    weights = [work.weights[row, column] for row in rows]
                    _multiply(work, acc, state, T.Bind(panel + pair * (2 * width)), weights)
            for r, row in enumerate(rows):
                scale = T.Bind(splat(work.scales[row, _WEIGHTS], lanes))
                factor = T.Bind(work.factor[row, ramp(0, lanes)])
                for j in range(vectors):
                    place = ramp(work.row(row) + group * width + part + j * lanes, lanes)
                    exact = T.cast(acc[r, j, ramp(0, lanes)], f"float32x{lanes}")
                    T.buffer_store(work.sums, work.sums[place] * factor + exact * scale, [place])


INT8 = Form(_pack_query, _score, _scale, _pack_weights, _add_values)
