"""The form of attention that computes in f32: for an f32 cache, and for bf16 where there are no products of pairs.

Per step of 64 cells, for all rows of a task: scores, the weights, then the sums. Panels of a block of 32 keys, and of the
step's values, are the outer loops: keys over some dims, or a few vectors of dims over all cells. Where several register tiles
of rows meet a panel of bf16 it is widened once, into L1; a single tile, as in decode, widens as it multiplies. Queries lie
ready in the order in which tiles read them. Cells that were never written are selected away, never multiplied: they may hold
anything.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from q35c.codegen.cpu.kernels.attention.shape import LOWEST, STEP, AttentionShape
from q35c.codegen.cpu.kernels.vectors import STACK, Expr, fetch, hmax, hsum, ramp, splat, vexp
from q35c.layouts.cache import CELLS

_VECTORS = 2  # vectors of a register tile, in keys or in dims
_UNROLL = 4  # rows of a panel in one turn; LLVM would take one, where a turn's own instructions are a sixth
_DIMS = 128  # of keys in one panel: in f32 it takes 16 KiB, half of L1

Panel = Callable[[Expr, int], Expr]  # k, j -> the j-th vector of row k


def attend(
    shape: AttentionShape, q: Expr, state: Expr, base: Expr, kv_head: Expr, first: Expr, tokens: Expr,
    start: Expr, first_step: Expr, end_step: Expr, end_cell: Expr, w: Expr, at: Expr,
) -> None:  # fmt: skip
    """Emit one task: its rows attend to steps first_step..end_step of 64 cells before end_cell.

    Row r is query head kv_head * group + r % group of token first + r // group; rows beyond the last token
    repeat it and are not stored. A row's D sums, its maximum and its sum of weights are left in w.
    """
    lanes, height = shape.lanes, shape.tile_rows
    queries = T.alloc_buffer((shape.tiles, shape.D, height), "float32", annotations=STACK)
    scores = T.alloc_buffer((shape.tiles * height, STEP), "float32", annotations=STACK)
    wide = T.alloc_buffer((_DIMS, CELLS), "float32", annotations=STACK)
    tiles = T.Bind(shape.live_tiles(T.min(tokens - first, T.int64(shape.query_tokens))))
    with T.serial(tiles) as tile, T.serial(T.int64(height)) as r:
        row = T.Bind(tile * height + r)
        head = kv_head * shape.group + T.truncmod(row, T.int64(shape.group))
        token, column = T.Bind(shape.token(first, row, tokens)), T.Bind(head * shape.D)
        with T.serial(T.int64(shape.D)) as d:
            T.buffer_store(queries, q[token, column + d], [tile, d, r])
        _clear_row(shape, w, T.Bind(at + row * shape.row_words))
    with T.serial(end_step - first_step) as s:
        step = T.Bind(first_step + s)
        cells = T.Bind(T.min(end_cell - step * STEP, T.int64(STEP)))
        with T.serial(T.truncdiv(cells + (CELLS - 1), T.int64(CELLS))) as number:
            block = T.Bind(step * (STEP // CELLS) + number)
            place = (base, kv_head, block, end_cell)
            _score_block(shape, queries, state, place, tiles, scores, number * CELLS, wide)
        with T.serial(tiles * height) as row:
            token = shape.token(first, row, tokens)
            last_cell = shape.last_cell(start, token, end_cell)
            last_cell = T.Bind(T.cast(last_cell - step * STEP, "int32"))
            _soften_row(shape, scores, row, last_cell, w, T.Bind(at + row * shape.row_words))
        values = T.Bind(shape.cache.value(base, kv_head, step * STEP))
        width = _VECTORS * lanes
        with T.serial(T.int64(shape.D // width)) as v:
            _add_values(shape, scores, state, values, cells, tiles, w, at, v * width, _VECTORS, wide)  # fmt: skip
        if shape.D % width:
            rest = T.int64(shape.D - lanes)
            _add_values(shape, scores, state, values, cells, tiles, w, at, rest, 1, wide)


def _score_block(
    shape: AttentionShape, queries: Expr, state: Expr, place: tuple[Expr, Expr, Expr, Expr], tiles: Expr,
    scores: Expr, column: Expr, wide: Expr,
) -> None:  # fmt: skip
    """Emit scores[row, column + cell] = q . k for 32 keys, whose place is base, key head, block and the last cell's end."""
    lanes, (base, kv_head, block, _) = shape.lanes, place
    keys = T.Bind(shape.cache.key(base, kv_head, block))
    ahead = _following(shape, place)
    firsts = range(0, CELLS // lanes, _VECTORS)
    for dim in range(0, shape.D, _DIMS):
        dims, start = min(_DIMS, shape.D - dim), keys + dim * CELLS
        panel = _panel(shape, state, start, CELLS, T.int64(dims), CELLS // lanes, wide)
        with T.serial(tiles) as tile:
            for turn, j in enumerate(firsts):
                lines = [first + dim * CELLS for first in ahead[turn :: len(firsts)]]
                part = _fetching(state, lines, _vectors_from(panel, j))
                _score_tile(shape, queries, (dim, dims), part, scores, tile, column + j * lanes)


def _vectors_from(panel: Panel, first: int) -> Panel:
    """Return a panel without its first vectors."""
    return lambda k, j: panel(k, first + j)


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
            T.buffer_store(wide, load(k, j), [k, ramp(j * lanes, lanes)])
    return lambda k, j: wide[k, ramp(j * lanes, lanes)]


def _following(shape: AttentionShape, place: tuple[Expr, Expr, Expr, Expr]) -> list[Expr]:
    """Return where the keys and values of the next block begin, if a task fetches them into L2 while it multiplies this one.

    A task that meets a block only once does: values are read in columns, which the processor's own prefetching does not
    follow. A block has a cache line of bf16 keys for each dim, and as many of values.
    """
    if shape.tiles > 1 or shape.cache.dtype != "bf16":
        return []
    base, kv_head, block, end_cell = place
    following = T.Bind(T.min(block + 1, T.truncdiv(end_cell - 1, T.int64(CELLS))))
    value = shape.cache.value(base, kv_head, following * CELLS)
    return [T.Bind(shape.cache.key(base, kv_head, following)), T.Bind(value)]


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
    shape: AttentionShape, queries: Expr, dims: tuple[int, int], keys: Panel, scores: Expr, tile: Expr, column: Expr
) -> None:  # fmt: skip
    """Emit scores[row, column + cell] += q . k for the rows of a tile, a panel of cells and dims; the first dims begin at 0."""
    lanes, (first, count) = shape.lanes, dims
    acc = _tile(shape, _VECTORS)
    places = [
        (r, j, [tile * shape.tile_rows + r, ramp(column + j * lanes, lanes)])
        for r in range(shape.tile_rows)
        for j in range(_VECTORS)
    ]
    for r, j, place in places:
        before = scores[*place] if first else splat(0.0, lanes)
        T.buffer_store(acc, before, [r, j, ramp(0, lanes)])

    def factors(d: Expr) -> list[Expr]:
        return [queries[tile, first + d, r] for r in range(shape.tile_rows)]

    _multiply_add(shape, acc, keys, factors, T.int64(count))
    for r, j, place in places:
        T.buffer_store(scores, acc[r, j, ramp(0, lanes)], place)


def _soften_row(
    shape: AttentionShape, scores: Expr, row: Expr, last_cell: Expr, w: Expr, at: Expr
) -> None:
    """Emit the online softmax of one row of scores: update its maximum and sum, leave weights in scores.

    The factor for the sums so far is left behind the row's maximum and sum.
    """
    lanes, whole = shape.lanes, ramp(0, shape.lanes)
    # A block's vectors at a time: a whole step, unrolled, takes three times as long to compile.
    offsets = range(0, CELLS, lanes)
    best = T.alloc_buffer((1, lanes), "float32", annotations=STACK)
    total = T.alloc_buffer((1, lanes), "float32", annotations=STACK)

    def seen(column: Expr) -> Expr:
        return T.ramp(T.cast(column, "int32"), 1, lanes) <= T.broadcast(last_cell, lanes)

    T.buffer_store(best, splat(LOWEST, lanes), [0, whole])
    T.buffer_store(total, splat(0.0, lanes), [0, whole])
    with T.serial(T.int64(STEP // CELLS)) as block:
        highest = best[0, whole]
        for column in (block * CELLS + offset for offset in offsets):
            score = scores[row, ramp(column, lanes)]
            highest = T.max(highest, T.Select(seen(column), score, splat(LOWEST, lanes)))
        T.buffer_store(best, highest, [0, whole])
    old = T.Bind(w[at + shape.D])
    new = T.Bind(T.max(old, hmax(best[0, whole], lanes)))
    with T.serial(T.int64(STEP // CELLS)) as block:
        added = total[0, whole]
        for column in (block * CELLS + offset for offset in offsets):
            power = vexp(scores[row, ramp(column, lanes)] - splat(new, lanes), lanes)
            weight = T.Bind(T.Select(seen(column), power, splat(0.0, lanes)))
            T.buffer_store(scores, weight, [row, ramp(column, lanes)])
            added = added + weight
        T.buffer_store(total, added, [0, whole])
    factor = T.Bind(vexp(old - new, 1))
    T.buffer_store(w, new, [at + shape.D])
    T.buffer_store(
        w, w[at + shape.D + 1] * factor + hsum(total[0, whole], lanes), [at + shape.D + 1]
    )
    T.buffer_store(w, factor, [at + shape.D + 2])


def _add_values(
    shape: AttentionShape, scores: Expr, state: Expr, values: Expr, cells: Expr, tiles: Expr, w: Expr, at: Expr,
    column: Expr, vectors: int, wide: Expr,
) -> None:  # fmt: skip
    """Emit sums = sums * factor + weights V for all rows and a few vectors of dims."""
    lanes = shape.lanes
    panel = _panel(shape, state, values + column, shape.D, cells, vectors, wide)
    with T.serial(tiles) as tile:
        row = T.Bind(tile * shape.tile_rows)
        acc = _tile(shape, vectors)
        starts = [T.Bind(at + (row + r) * shape.row_words) for r in range(shape.tile_rows)]
        sums = [
            (r, j, ramp(start + column + j * lanes, lanes))
            for r, start in enumerate(starts)
            for j in range(vectors)
        ]
        for r, j, place in sums:
            factor = splat(w[starts[r] + shape.D + 2], lanes)
            T.buffer_store(acc, w[place] * factor, [r, j, ramp(0, lanes)])

        def factors(cell: Expr, row: Expr = row) -> list[Expr]:
            return [scores[row + r, cell] for r in range(shape.tile_rows)]

        _multiply_add(shape, acc, panel, factors, cells)
        for r, j, place in sums:
            T.buffer_store(w, acc[r, j, ramp(0, lanes)], [place])


def _tile(shape: AttentionShape, vectors: int) -> Expr:
    return T.alloc_buffer((shape.tile_rows, vectors, shape.lanes), "float32", annotations=STACK)


def _multiply_add(
    shape: AttentionShape, acc: Expr, panel: Panel, factors: Callable[[Expr], list[Expr]], count: Expr
) -> None:  # fmt: skip
    """Emit acc[r, j] += the j-th vector of row k of a panel * factors(k)[r] for k < count, in this order."""
    turns = T.Bind(T.truncdiv(count, T.int64(_UNROLL)))
    with T.serial(turns) as turn:
        for u in range(_UNROLL):
            k = turn * _UNROLL + u
            _multiply_add_row(shape, acc, panel, k, factors(k))
    with T.serial(count - turns * _UNROLL) as rest:
        k = turns * _UNROLL + rest
        _multiply_add_row(shape, acc, panel, k, factors(k))


def _multiply_add_row(
    shape: AttentionShape, acc: Expr, panel: Panel, k: Expr, factors: list[Expr]
) -> None:
    """Emit acc[r, j] += the j-th vector of row k of a panel * factors[r]."""
    lanes, (_, vectors, _) = shape.lanes, acc.shape
    row = [T.Bind(panel(k, j)) for j in range(int(vectors))]
    for r, factor in enumerate(factors):
        factor = T.Bind(splat(factor, lanes))
        for j, vector in enumerate(row):
            at = [r, j, ramp(0, lanes)]
            T.buffer_store(acc, acc[*at] + vector * factor, at)
