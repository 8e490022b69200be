"""The form of attention that computes in f32: for an f32 cache, and for bf16 where there are no products of pairs.

Panels of a block of 32 keys, and of its values, are the outer loops: a few vectors of keys over all dims, or of dims
over all cells. Where several tiles of 4 rows meet a panel of bf16 it is widened once, into L1; a single tile, as in
decode, widens as it multiplies. Cells that were never written are selected away, never multiplied: they may hold
anything.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from q35c.codegen.kernels.attention_shape import CELLS, LOWEST, TILE_ROWS, AttentionShape
from q35c.codegen.kernels.common import STACK, Expr, fetch, hmax, hsum, ramp, splat, vexp

_VECTORS = 2  # vectors of a register tile, in keys or in dims
_DIMS = 128  # of keys in one panel: it takes 8 or 16 KiB of L1, beside the same dims of a task's queries

Panel = Callable[[Expr, int], Expr]  # k, j -> the j-th vector of row k


def attend(
    shape: AttentionShape, q: Expr, state: Expr, base: Expr, kv_head: Expr, first: Expr, tokens: Expr,
    start: Expr, first_block: Expr, end_block: Expr, end_cell: Expr, w: Expr, at: Expr,
) -> None:  # fmt: skip
    """Emit one task: its rows attend to blocks first_block..end_block of cells before end_cell.

    Row r is query head kv_head * group + r % group of token first + r // group; rows beyond the last token
    repeat it and are not stored. A row's D sums, its maximum and its sum of weights are left in w.
    """
    lanes, rows = shape.lanes, shape.tiles * TILE_ROWS
    scores = T.alloc_buffer((rows, CELLS), "float32", annotations=STACK)
    wide = T.alloc_buffer((_DIMS, _VECTORS, lanes), "float32", annotations=STACK)

    def token_of(row: Expr) -> Expr:
        return T.Bind(T.min(first + T.truncdiv(row, T.int64(shape.group)), tokens - 1))

    def query_of(row: Expr) -> tuple[Expr, Expr]:
        """Return a row's token, and where in it its query begins."""
        head = kv_head * shape.group + T.truncmod(row, T.int64(shape.group))
        return token_of(row), T.Bind(head * shape.D)

    def live(row: Expr) -> Expr:
        return T.Bind(T.min(row, T.int64(shape.rows - 1)))

    with T.serial(T.int64(rows)) as row:
        _clear_row(shape, w, T.Bind(at + row * shape.row_words))
    with T.serial(end_block - first_block) as b:
        block = T.Bind(first_block + b)
        keys = T.Bind(shape.cache.key(base, kv_head, block))
        values = T.Bind(shape.cache.value(base, kv_head, block * CELLS))
        cells = T.Bind(T.min(end_cell - block * CELLS, T.int64(CELLS)))
        following = T.Bind(T.min(block + 1, end_block - 1))
        ahead = (
            T.Bind(shape.cache.key(base, kv_head, following)),
            T.Bind(shape.cache.value(base, kv_head, following * CELLS)),
        )
        passes = range(0, CELLS, _VECTORS * lanes)
        for number, column in enumerate(passes):
            for dim in range(0, shape.D, _DIMS):
                dims, corner = min(_DIMS, shape.D - dim), keys + (dim * CELLS + column)
                panel = _panel(shape, state, corner, CELLS, T.int64(dims), _VECTORS, wide)
                if _fetches(shape):
                    starts = [start + dim * CELLS for start in ahead[number :: len(passes)]]
                    panel = _fetching(state, starts, panel)
                with T.serial(T.int64(shape.tiles)) as tile:
                    queries = [query_of(live(tile * TILE_ROWS + r)) for r in range(TILE_ROWS)]
                    place = (tile * TILE_ROWS, column)
                    _score_tile(shape, q, queries, (dim, dims), panel, scores, place)
        with T.serial(T.int64(rows)) as row:
            last_cell = T.Bind(T.cast(start + token_of(live(row)) - block * CELLS, "int32"))
            _soften_row(shape, scores, row, last_cell, w, T.Bind(at + row * shape.row_words))
        width = _VECTORS * lanes
        with T.serial(T.int64(shape.D // width)) as v:
            _add_values(shape, scores, state, values, cells, w, at, v * width, _VECTORS, wide)
        if shape.D % width:
            rest = T.int64(shape.D - lanes)
            _add_values(shape, scores, state, values, cells, w, at, rest, 1, wide)


def _panel(
    shape: AttentionShape, state: Expr, start: Expr, stride: int, rows: Expr, vectors: int, wide: Expr
) -> Panel:  # fmt: skip
    """Return how to get the vectors of some rows of the cache in f32; widen them into `wide` where that pays."""
    lanes = shape.lanes

    def load(k: Expr, j: int) -> Expr:
        return shape.cache.load(state, start + k * stride + j * lanes, lanes)

    if shape.tiles == 1 or shape.cache.dtype == "f32":
        return load
    with T.serial(rows) as k:
        for j in range(vectors):
            T.buffer_store(wide, load(k, j), [k, j, ramp(0, lanes)])
    return lambda k, j: wide[k, j, ramp(0, lanes)]


def _fetches(shape: AttentionShape) -> bool:
    """Tell whether a task fetches its next block into L2 while it multiplies this one: one that meets it only once.

    Values are read in columns, which the processor's own prefetching does not follow. A block has a cache line of bf16 keys
    for each dim, and as many of values.
    """
    return shape.tiles == 1 and shape.cache.dtype == "bf16"


def _fetching(state: Expr, starts: list[Expr], panel: Panel) -> Panel:
    """Return a panel that fetches line k from each start on with its row k."""

    def load(k: Expr, j: int) -> Expr:
        if j == 0:
            for start in starts:
                fetch(state[start + k * CELLS], 2)
        return panel(k, j)

    return load


def _clear_row(shape: AttentionShape, w: Expr, at: Expr) -> None:
    """Emit the start of a row: no sums yet, the lowest maximum."""
    for v in range(shape.D // shape.lanes):
        T.buffer_store(w, splat(0.0, shape.lanes), [ramp(at + v * shape.lanes, shape.lanes)])
    T.buffer_store(w, T.float32(LOWEST), [at + shape.D])
    T.buffer_store(w, T.float32(0), [at + shape.D + 1])


def _score_tile(
    shape: AttentionShape, q: Expr, queries: list[tuple[Expr, Expr]], dims: tuple[int, int], keys: Panel,
    scores: Expr, corner: tuple[Expr, int],
) -> None:  # fmt: skip
    """Emit scores[row + r, column + cell] += q_r . k for a panel of cells and dims; the first dims begin at 0."""
    lanes, (first, count), (row, column) = shape.lanes, dims, corner
    acc = _tile(shape, _VECTORS)
    places = [
        (r, j, [row + r, ramp(column + j * lanes, lanes)])
        for r in range(TILE_ROWS)
        for j in range(_VECTORS)
    ]
    for r, j, place in places:
        before = scores[*place] if first else splat(0.0, lanes)
        T.buffer_store(acc, before, [r, j, ramp(0, lanes)])
    with T.serial(T.int64(count)) as d:
        factors = [q[token, place + first + d] for token, place in queries]
        _multiply_add(shape, acc, keys, d, factors)
    for r, j, place in places:
        T.buffer_store(scores, acc[r, j, ramp(0, lanes)], place)


def _soften_row(
    shape: AttentionShape, scores: Expr, row: Expr, last_cell: Expr, w: Expr, at: Expr
) -> None:
    """Emit the online softmax of one row of scores: update its maximum and sum, leave weights in scores.

    The factor for the sums so far is left behind the row's maximum and sum.
    """
    lanes = shape.lanes
    columns = [ramp(v * lanes, lanes) for v in range(CELLS // lanes)]
    seen = [
        T.ramp(T.int32(v * lanes), 1, lanes) <= T.broadcast(last_cell, lanes)
        for v in range(len(columns))
    ]
    masked = [
        T.Bind(T.Select(mask, scores[row, column], splat(LOWEST, lanes)))
        for mask, column in zip(seen, columns, strict=True)
    ]
    best = masked[0]
    for score in masked[1:]:
        best = T.max(best, score)
    old = T.Bind(w[at + shape.D])
    new = T.Bind(T.max(old, hmax(best, lanes)))
    total = splat(0.0, lanes)
    for mask, score, column in zip(seen, masked, columns, strict=True):
        power = vexp(score - splat(new, lanes), lanes)
        weight = T.Bind(T.Select(mask, power, splat(0.0, lanes)))
        T.buffer_store(scores, weight, [row, column])
        total = total + weight
    factor = T.Bind(vexp(old - new, 1))
    T.buffer_store(w, new, [at + shape.D])
    T.buffer_store(w, w[at + shape.D + 1] * factor + hsum(total, lanes), [at + shape.D + 1])
    T.buffer_store(w, factor, [at + shape.D + 2])


def _add_values(
    shape: AttentionShape, scores: Expr, state: Expr, values: Expr, cells: Expr, w: Expr, at: Expr,
    column: Expr, vectors: int, wide: Expr,
) -> None:  # fmt: skip
    """Emit sums = sums * factor + weights V for all rows and a few vectors of dims."""
    lanes = shape.lanes
    panel = _panel(shape, state, values + column, shape.D, cells, vectors, wide)
    with T.serial(T.int64(shape.tiles)) as tile:
        row = T.Bind(tile * TILE_ROWS)
        acc = _tile(shape, vectors)
        starts = [T.Bind(at + (row + r) * shape.row_words) for r in range(TILE_ROWS)]
        sums = [
            (r, j, ramp(start + column + j * lanes, lanes))
            for r, start in enumerate(starts)
            for j in range(vectors)
        ]
        for r, j, place in sums:
            factor = splat(w[starts[r] + shape.D + 2], lanes)
            T.buffer_store(acc, w[place] * factor, [r, j, ramp(0, lanes)])
        with T.serial(cells) as cell:
            _multiply_add(
                shape, acc, panel, cell, [scores[row + r, cell] for r in range(TILE_ROWS)]
            )
        for r, j, place in sums:
            T.buffer_store(w, acc[r, j, ramp(0, lanes)], [place])


def _tile(shape: AttentionShape, vectors: int) -> Expr:
    return T.alloc_buffer((TILE_ROWS, vectors, shape.lanes), "float32", annotations=STACK)


def _multiply_add(
    shape: AttentionShape, acc: Expr, panel: Panel, k: Expr, factors: list[Expr]
) -> None:
    """Emit acc[r, j] += the j-th vector of row k of a panel * factors[r]."""
    lanes, (_, vectors, _) = shape.lanes, acc.shape
    for r, factor in enumerate(factors):
        for j in range(int(vectors)):
            at = [r, j, ramp(0, lanes)]
            T.buffer_store(acc, acc[*at] + panel(k, j) * splat(factor, lanes), at)
