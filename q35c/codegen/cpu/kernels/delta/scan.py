"""The gated delta rule over a run of tokens, one chunk at a time (matrix products instead of one step per token).

With G_i the sum of g inside the chunk up to row i, S the state before the chunk, and every decay a masked
exp(G_i - G_j), i >= j (never exp(G_i) * exp(-G_j), which is 0 * inf on real weights):

    A_ij = beta_i k_i.k_j exp(G_i - G_j)   j < i        W_ij = q_i.k_j exp(G_i - G_j)   j <= i
    X    = (I + A)^-1 beta (V - exp(G) K S)             Y = exp(G) Q S + W X
    S'   = exp(G_last) S + K^T (exp(G_last - G) X)

The inverse is never formed: X comes from forward substitution, one tile of rows at a time. All that follows A and W
is independent per column tile, so the state is kept packed as [Dv/columns][Dk][columns] while a head is worked on:
row-major, the rows of one column tile would fall on an eighth of the L1 sets. Cost per token and head: 3 Dk Dv
multiply-adds for the state and C/2 (2 Dk + 2 Dv) inside the chunk. The limit is the multiply-add rate.
Source: "Gated Delta Networks", arXiv 2412.06464, section 3.3, solved in the UT form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.cpu.kernels.delta.register_tile import (
    Left,
    Right,
    TileShape,
    clear,
    multiply_add,
    scalars,
    tile_for,
    vectors,
)
from q35c.codegen.cpu.kernels.delta.step import L2_EPS, DeltaShape, decay_log
from q35c.codegen.cpu.kernels.vectors import (
    STACK,
    Expr,
    hsum,
    ramp,
    splat,
    splat_int,
    vector_type,
    vexp,
    vrsqrt,
    vsigmoid,
)
from q35c.layouts.blobs import GRID

# C, tokens in a chunk. 32, 48 and 64 ran within 5 % of each other on AVX2, 96 was slower; fewer tokens mean less work
# inside the chunk (it grows with C) and less scratch.
CHUNK = GRID


@dataclass(frozen=True)
class ScanShape:
    """Lay out one thread's scratch, in f32 elements; every part is a multiple of 64 bytes."""

    delta: DeltaShape
    rows: int  # C, tokens in a chunk
    tile: TileShape  # over the value columns
    score: TileShape  # over the chunk's columns

    @property
    def sizes(self) -> dict[str, int]:
        """Return the parts of the scratch."""
        rows, delta = self.rows, self.delta
        return {
            "state": delta.Dk * delta.Dv,  # [Dv/columns][Dk][columns]
            "q": rows * delta.Dk,  # [C][Dk], normalised and scaled
            "k": rows * delta.Dk,  # [C][Dk], normalised
            "k_columns": delta.Dk * rows,  # [Dk][C], its transpose
            "a": rows * rows,  # [C][C], minus A
            "w": rows * rows,
            "x": rows * self.tile.columns,  # [C][columns] of one column tile
            "g": rows,  # G
            "beta": rows,
            "decay": rows,  # exp(G)
            "rest": rows,  # exp(G_last - G)
        }

    def at(self, name: str) -> int:
        """Return the offset of one part of the scratch."""
        names = list(self.sizes)
        return sum(list(self.sizes.values())[: names.index(name)])

    @property
    def total(self) -> int:
        """Return the f32 elements of one thread's scratch."""
        return sum(self.sizes.values())

    def tiled(self, column: Expr, d: Expr, j: Expr) -> Expr:
        """Return where vector j of state row d lies in column tile `column`."""
        return (
            self.at("state")
            + (column * self.delta.Dk + d) * self.tile.columns
            + j * self.tile.lanes
        )

    def plain(self, base: Expr, column: Expr, d: Expr, j: Expr) -> Expr:
        """Return where the same vector lies in the sequence's state region."""
        return base + d * self.delta.Dv + column * self.tile.columns + j * self.tile.lanes

    def row_block(self, w: Expr, name: str, block: Expr) -> Left:
        """Return left factors from one block of rows of q or k."""
        base = self.at(name) + block * (self.tile.rows * self.delta.Dk)
        return scalars(w, base, self.delta.Dk, 1, self.tile.lanes)

    def score_block(self, w: Expr, name: str, block: Expr) -> Left:
        """Return left factors from one block of rows of -A or W."""
        base = self.at(name) + block * (self.tile.rows * self.rows)
        return scalars(w, base, self.rows, 1, self.tile.lanes)

    def state_tile(self, w: Expr, column: Expr) -> Right:
        """Return the rows of one column tile of the state."""
        return vectors(w, self.tiled(column, 0, 0), self.tile.columns, self.tile.lanes)

    def minus_beta(self, w: Expr) -> Callable[[Expr], Expr]:
        """Return the factor of a row of -A."""
        return lambda row: T.float32(0) - w[self.at("beta") + row]

    def x_tile(self, w: Expr) -> Right:
        """Return the rows of X."""
        return vectors(w, self.at("x"), self.tile.columns, self.tile.lanes)


def scan_shape(delta: DeltaShape) -> ScanShape:
    """Choose the chunk and the tiles for a layer."""
    return ScanShape(delta, CHUNK, tile_for(delta.Dv, delta.isa), tile_for(CHUNK, delta.isa))


def one(_row: Expr) -> Expr:
    """Return the factor of a row of W."""
    return T.float32(1)


@T.inline
def pack_state(scan, w, state, base):
    """Copy a head's state into column tiles."""
    for c in T.serial(scan.delta.Dv // scan.tile.columns):
        for d in T.serial(scan.delta.Dk):
            for j in T.unroll(scan.tile.vectors):
                w[ramp(scan.tiled(c, d, j), scan.tile.lanes)] = state[
                    ramp(scan.plain(base, c, d, j), scan.tile.lanes)
                ]


@T.inline
def unpack_state(scan, w, state, base):
    """Copy the column tiles back into a head's state."""
    for d in T.serial(scan.delta.Dk):
        for c in T.serial(scan.delta.Dv // scan.tile.columns):
            for j in T.unroll(scan.tile.vectors):
                state[ramp(scan.plain(base, c, d, j), scan.tile.lanes)] = w[
                    ramp(scan.tiled(c, d, j), scan.tile.lanes)
                ]


@T.inline
def normalise_row(scan, source, row, column, w, at, factor):
    """w[at:] = source row * rsqrt(|row|^2 + eps) * factor."""
    square = T.alloc_buffer((scan.tile.lanes,), "float32")
    square[ramp(0, scan.tile.lanes)] = splat(0.0, scan.tile.lanes)
    for d in T.unroll(scan.delta.Dk // scan.tile.lanes):
        value: T.let[vector_type("float32", scan.tile.lanes)] = source[
            row, ramp(column + d * scan.tile.lanes, scan.tile.lanes)
        ]
        square[ramp(0, scan.tile.lanes)] = square[ramp(0, scan.tile.lanes)] + value * value
    total: T.let[T.float32] = hsum(square[ramp(0, scan.tile.lanes)], scan.tile.lanes)
    scale: T.let[T.float32] = T.float32(factor) * vrsqrt(total + T.float32(L2_EPS), 1)
    for d in T.unroll(scan.delta.Dk // scan.tile.lanes):
        w[ramp(at + d * scan.tile.lanes, scan.tile.lanes)] = source[
            row, ramp(column + d * scan.tile.lanes, scan.tile.lanes)
        ] * splat(scale, scan.tile.lanes)


@T.inline
def load_rows(scan, qkv, w, head, first, live, padded):
    """Fill q, k and the transpose of k; rows from `live` to `padded` are zero."""
    for i in T.serial(live):
        normalise_row(
            scan, qkv, first + i, scan.delta.q(head), w, scan.at("q") + i * scan.delta.Dk,
            scan.delta.Dk**-0.5,
        )  # fmt: skip
        normalise_row(
            scan, qkv, first + i, scan.delta.k(head), w, scan.at("k") + i * scan.delta.Dk, 1.0
        )
    for i in T.serial(padded - live):
        for d in T.serial(scan.delta.Dk // scan.tile.lanes):
            at: T.let[T.int64] = (live + i) * scan.delta.Dk + d * scan.tile.lanes
            w[ramp(scan.at("q") + at, scan.tile.lanes)] = splat(0.0, scan.tile.lanes)
            w[ramp(scan.at("k") + at, scan.tile.lanes)] = splat(0.0, scan.tile.lanes)
    for d in T.serial(scan.delta.Dk):
        for i in T.serial(padded):
            w[scan.at("k_columns") + d * scan.rows + i] = w[scan.at("k") + i * scan.delta.Dk + d]


@T.inline
def load_gates(scan, a, b, a_log, dt_bias, w, head, first, live):
    """Fill beta, G, exp(G) and exp(G_last - G); rows from `live` on have beta 0 and a flat G."""
    for i in T.serial(scan.rows):
        row: T.let[T.int64] = first + T.min(T.cast(i, "int64"), live - 1)
        w[scan.at("g") + i] = a[row, head]
        w[scan.at("beta") + i] = b[row, head]
    for i in T.serial(scan.rows // scan.tile.lanes):
        g: T.let[T.int64] = scan.at("g") + T.cast(i, "int64") * scan.tile.lanes
        beta: T.let[T.int64] = scan.at("beta") + T.cast(i, "int64") * scan.tile.lanes
        w[ramp(g, scan.tile.lanes)] = decay_log(
            w[ramp(g, scan.tile.lanes)],
            splat(dt_bias[head], scan.tile.lanes),
            splat(a_log[head], scan.tile.lanes),
            scan.tile.lanes,
        )
        w[ramp(beta, scan.tile.lanes)] = vsigmoid(w[ramp(beta, scan.tile.lanes)], scan.tile.lanes)
    for i in T.serial(T.int64(1), T.int64(scan.rows)):
        if i < live:
            w[scan.at("g") + i] = w[scan.at("g") + i] + w[scan.at("g") + i - 1]
        else:
            w[scan.at("g") + i] = w[scan.at("g") + i - 1]
            w[scan.at("beta") + i] = T.float32(0)
    last: T.let[T.float32] = w[scan.at("g") + scan.rows - 1]
    for i in T.serial(scan.rows // scan.tile.lanes):
        g: T.let[vector_type("float32", scan.tile.lanes)] = w[
            ramp(scan.at("g") + i * scan.tile.lanes, scan.tile.lanes)
        ]
        w[ramp(scan.at("decay") + i * scan.tile.lanes, scan.tile.lanes)] = vexp(g, scan.tile.lanes)
        w[ramp(scan.at("rest") + i * scan.tile.lanes, scan.tile.lanes)] = vexp(
            splat(last, scan.tile.lanes) - g, scan.tile.lanes
        )


@T.inline
def store_scores(scan, w, acc, name, block, columns, factor, diagonal):
    """Write one tile of -A or W: products times the masked decay and the row's factor."""
    for r in T.unroll(scan.score.rows):
        row: T.let[T.int64] = block * scan.score.rows + r
        for j in T.unroll(scan.score.vectors):
            column: T.let[T.int64] = columns * scan.score.columns + j * scan.score.lanes
            decay: T.let[vector_type("float32", scan.score.lanes)] = vexp(
                T.min(
                    splat(w[scan.at("g") + row], scan.score.lanes)
                    - w[ramp(scan.at("g") + column, scan.score.lanes)],
                    splat(0.0, scan.score.lanes),
                ),
                scan.score.lanes,
            )
            w[ramp(scan.at(name) + row * scan.rows + column, scan.score.lanes)] = T.Select(
                ramp(T.cast(column, "int32"), scan.score.lanes)
                < splat_int(T.cast(row, "int32") + diagonal, scan.score.lanes),
                acc[r, j, ramp(0, scan.score.lanes)] * decay * splat(factor(row), scan.score.lanes),
                splat(0.0, scan.score.lanes),
            )


@T.inline
def score_rows(scan, w, left, name, block, factor, diagonal):
    """Compute one block of rows of -A or W; `diagonal` is 1 when the diagonal counts."""
    width: T.let[T.int64] = (block + 1) * scan.score.rows
    for columns in T.serial(
        T.truncdiv(width + (scan.score.columns - 1), T.int64(scan.score.columns))
    ):
        acc = T.alloc_buffer(
            (scan.score.rows, scan.score.vectors, scan.score.lanes), "float32", annotations=STACK
        )
        clear(acc, scan.score)
        multiply_add(
            acc, scan.score, scan.row_block(w, left, block),
            vectors(w, scan.at("k_columns") + columns * scan.score.columns, scan.rows, scan.score.lanes),
            scan.delta.Dk,
        )  # fmt: skip
        store_scores(scan, w, acc, name, block, columns, factor, diagonal)


@T.inline
def solve_rows(scan, w, qkv, head, first, live, block, column):
    """X rows of one block: beta (V - exp(G) K S), minus A X of earlier rows, then substitution."""
    x = T.alloc_buffer(
        (scan.tile.rows, scan.tile.vectors, scan.tile.lanes), "float32", annotations=STACK
    )
    clear(x, scan.tile)
    multiply_add(
        x, scan.tile, scan.row_block(w, "k", block), scan.state_tile(w, column), scan.delta.Dk
    )
    for r in T.unroll(scan.tile.rows):
        row: T.let[T.int64] = block * scan.tile.rows + r
        for j in T.unroll(scan.tile.vectors):
            v: T.let[vector_type("float32", scan.tile.lanes)] = qkv[
                first + T.min(row, live - 1),
                ramp(scan.delta.v(head) + column * scan.tile.columns + j * scan.tile.lanes, scan.tile.lanes),
            ]  # fmt: skip
            x[r, j, ramp(0, scan.tile.lanes)] = (
                v - x[r, j, ramp(0, scan.tile.lanes)] * splat(w[scan.at("decay") + row], scan.tile.lanes)
            ) * splat(w[scan.at("beta") + row], scan.tile.lanes)  # fmt: skip
    multiply_add(
        x, scan.tile, scan.score_block(w, "a", block), scan.x_tile(w), block * scan.tile.rows
    )
    for r in T.unroll(scan.tile.rows):
        for c in T.unroll(scan.tile.rows):
            if c < r:
                for j in T.unroll(scan.tile.vectors):
                    x[r, j, ramp(0, scan.tile.lanes)] = x[r, j, ramp(0, scan.tile.lanes)] + x[
                        c, j, ramp(0, scan.tile.lanes)
                    ] * scan.score_block(w, "a", block)(r, block * scan.tile.rows + c)
    for r in T.unroll(scan.tile.rows):
        for j in T.unroll(scan.tile.vectors):
            at: T.let[T.int64] = (block * scan.tile.rows + r) * scan.tile.columns
            w[ramp(scan.at("x") + at + j * scan.tile.lanes, scan.tile.lanes)] = x[
                r, j, ramp(0, scan.tile.lanes)
            ]


@T.inline
def output_rows(scan, w, y, head, first, live, block, column):
    """Y rows of one block: exp(G) Q S + W X."""
    o = T.alloc_buffer(
        (scan.tile.rows, scan.tile.vectors, scan.tile.lanes), "float32", annotations=STACK
    )
    clear(o, scan.tile)
    multiply_add(
        o, scan.tile, scan.row_block(w, "q", block), scan.state_tile(w, column), scan.delta.Dk
    )
    for r in T.unroll(scan.tile.rows):
        for j in T.unroll(scan.tile.vectors):
            o[r, j, ramp(0, scan.tile.lanes)] = o[r, j, ramp(0, scan.tile.lanes)] * splat(
                w[scan.at("decay") + block * scan.tile.rows + r], scan.tile.lanes
            )
    multiply_add(
        o, scan.tile, scan.score_block(w, "w", block), scan.x_tile(w), (block + 1) * scan.tile.rows
    )
    for r in T.unroll(scan.tile.rows):
        if block * scan.tile.rows + r < live:
            for j in T.unroll(scan.tile.vectors):
                y[
                    first + block * scan.tile.rows + r,
                    ramp(head * scan.delta.Dv + column * scan.tile.columns + j * scan.tile.lanes, scan.tile.lanes),
                ] = o[r, j, ramp(0, scan.tile.lanes)]  # fmt: skip


@T.inline
def advance_state(scan, w, column, padded):
    """S' = exp(G_last) S + K^T X of one column tile, X first decayed to the end of the chunk."""
    for c in T.serial(padded):
        for j in T.unroll(scan.tile.vectors):
            at: T.let[T.int64] = scan.at("x") + c * scan.tile.columns + j * scan.tile.lanes
            w[ramp(at, scan.tile.lanes)] = w[ramp(at, scan.tile.lanes)] * splat(
                w[scan.at("rest") + c], scan.tile.lanes
            )
    for d in T.serial(T.int64(scan.delta.Dk // scan.tile.rows)):
        row: T.let[T.int64] = d * scan.tile.rows
        s = T.alloc_buffer(
            (scan.tile.rows, scan.tile.vectors, scan.tile.lanes), "float32", annotations=STACK
        )
        for r in T.unroll(scan.tile.rows):
            for j in T.unroll(scan.tile.vectors):
                s[r, j, ramp(0, scan.tile.lanes)] = w[
                    ramp(scan.tiled(column, row + r, j), scan.tile.lanes)
                ] * splat(w[scan.at("decay") + scan.rows - 1], scan.tile.lanes)
        multiply_add(
            s, scan.tile, scalars(w, scan.at("k") + row, 1, scan.delta.Dk, scan.tile.lanes),
            scan.x_tile(w), padded,
        )  # fmt: skip
        for r in T.unroll(scan.tile.rows):
            for j in T.unroll(scan.tile.vectors):
                w[ramp(scan.tiled(column, row + r, j), scan.tile.lanes)] = s[
                    r, j, ramp(0, scan.tile.lanes)
                ]


@T.inline
def scan_chunk(scan, qkv, a, b, a_log, dt_bias, w, y, head, first, live):
    """Advance one head by the `live` rows from `first`; leave the raw outputs in Y."""
    blocks: T.let[T.int64] = T.truncdiv(live + (scan.tile.rows - 1), T.int64(scan.tile.rows))
    padded: T.let[T.int64] = blocks * scan.tile.rows
    load_rows(scan, qkv, w, head, first, live, padded)
    load_gates(scan, a, b, a_log, dt_bias, w, head, first, live)
    for block in T.serial(blocks):
        score_rows(scan, w, "k", "a", block, scan.minus_beta(w), 0)
        score_rows(scan, w, "q", "w", block, one, 1)
    for column in T.serial(scan.delta.Dv // scan.tile.columns):
        for block in T.serial(blocks):
            solve_rows(scan, w, qkv, head, first, live, block, column)
            output_rows(scan, w, y, head, first, live, block, column)
        advance_state(scan, w, column, padded)
