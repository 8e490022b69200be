"""Products of many rounded rows with matrices of integers or bf16, on tensor cores.

    y[t, n] = sum_k x[t, k] w[n, k]         + r[t, n]         or silu(gate) * up of neighbouring halves of a block

A block of threads makes 64 rows of 128 outputs, a warp those of one block of 32 weights: it loads them, and makes levels of
codes, as the fragments of mma.sync that they lie as, once for its 64 rows. A word holds 4 codes or 2 bf16, and words of
both are placed alike: lane l has words l % 4 and l % 4 + 4 of row l / 4. Integers are added within a group, and scaled sums of
groups in order, so that a row's bits depend on no other. Fragments come straight from the caches: the limit is the peak of the
type, of which loads leave perhaps half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc

from q35c.codegen.cuda.kernels.blocks import block_words, level_word, weight_scale
from q35c.codegen.cuda.kernels.family import (
    ONE,
    WARP,
    Family,
    Grid,
    Parameters,
    ceil_div,
    fixed,
    per_row,
)
from q35c.codegen.cuda.kernels.linear import HALF, product_arguments, product_cost, weight_blocks
from q35c.codegen.cuda.kernels.make import Expr, T, add, array, let, local, make_kernel, store
from q35c.codegen.cuda.kernels.threads import from_bits, silu, threads, when
from q35c.formats.integer import IntegerFormat
from q35c.formats.registry import integer_format
from q35c.layouts.rows import IntegerRow
from q35c.layouts.weights import BLOCK

WARPS = 4  # each a block of 32 outputs
ROWS = 64
_M, _N, _WORDS = 16, 8, 8  # of one instruction: rows, outputs, words of inputs
_TILES_M, _TILES_N = ROWS // _M, BLOCK // _N
_MMA_S8 = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
_MMA_BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


@dataclass(frozen=True)
class Warp:
    """Where a warp is: its block's first word in w, its lane, and lane % 4."""

    w: Expr
    x: Expr
    base: Expr
    lane: Expr
    word: Expr
    tokens: Expr

    def places(self, first: Expr) -> list[Expr]:
        """Return the two of 16 rows, from `first` on, that a lane has a part of."""
        rows = (first + self.lane // 4 + 8 * i for i in range(2))
        return [let("place", T.min(row, self.tokens - 1)) for row in rows]


class Integers:
    """Integer weights and rows: a part of the inputs is a group."""

    def __init__(self, form: IntegerFormat, K: int) -> None:
        self.form, self.K = form, K
        self.layout = IntegerRow(K, form.group, has_starts=False)
        self.parts, self.steps = self.layout.groups, form.group // (4 * _WORDS)

    def load(self, at: Warp, group: Expr, b: Expr) -> Expr:
        """Let b be the levels of a group; return the scales of the columns that a lane has."""
        form, scales = self.form, local("scales", (2 * _TILES_N,))
        with T.grid(_TILES_N, 2) as (j, e):
            column = let("column", j * _N + at.word * 2 + e)
            store(scales, weight_scale(form, self.K, at.w, at.base, column, group), j * 2 + e)
        for step in range(self.steps):
            with T.grid(_TILES_N, 2) as (j, half):
                is_one_set = form.set_inputs == 4 * _WORDS
                number = step if is_one_set else step * 2 + half
                word = at.word + half * 4 if is_one_set else at.word
                row = j * _N + at.lane // 4
                levels = level_word(form, self.K, at.w, at.base, row, group, number, word)
                store(b, T.cast(levels, "uint32"), step, j, half)
        return scales

    def multiply(self, at: Warp, first: Expr, group: Expr, b: Expr, scales: Expr, acc: Expr, m: Expr) -> None:  # fmt: skip
        """Add a group's products of 16 rows."""
        sums, a = local("sums", (_TILES_N, 4), "uint32"), local("a", (4,), "uint32")
        shares, places = local("shares", (2,)), at.places(first)
        with T.grid(_TILES_N, 4) as (j, i):
            store(sums, T.uint32(0), j, i)
        for step in range(self.steps):
            word = let("at", group * (self.form.group // 4) + step * _WORDS + at.word)
            for i in range(4):
                store(a, at.x[places[i % 2], word + i // 2 * 4], i)
            for j in range(_TILES_N):
                _mma(_MMA_S8, [sums[j, i] for i in range(4)], a, b, step, j)
        for i, place in enumerate(places):
            store(shares, from_bits(T.cast(at.x[place, self.layout.scales + group], "int32")), i)
        with T.grid(_TILES_N, 4) as (j, i):
            product = scales[j * 2 + i % 2] * shares[i // 2]
            add(acc, T.cast(T.cast(sums[j, i], "int32"), "float32") * product, m, j, i)


class Halves:
    """bf16 weights and rows: a part of the inputs is what one instruction takes."""

    def __init__(self, K: int) -> None:
        self.words = ceil_div(K, 2)
        self.parts, self.steps = ceil_div(self.words, _WORDS), 1

    def _inside(self, word: Expr, value: Expr) -> Expr:
        """Return a word, zero where there is none."""
        if self.words % _WORDS == 0:
            return value
        return T.if_then_else(word < self.words, value, T.uint32(0))

    def load(self, at: Warp, part: Expr, b: Expr) -> None:
        with T.grid(_TILES_N, 2) as (j, half):
            word = let("at", part * _WORDS + half * 4 + at.word)
            value = at.w[at.base + word * BLOCK + j * _N + at.lane // 4]
            store(b, self._inside(word, value), 0, j, half)

    def multiply(self, at: Warp, first: Expr, part: Expr, b: Expr, scales: None, acc: Expr, m: Expr) -> None:  # fmt: skip
        a, places = local("a", (4,), "uint32"), at.places(first)
        for i in range(4):
            word = let("at", part * _WORDS + i // 2 * 4 + at.word)
            store(a, self._inside(word, at.x[places[i % 2], word]), i)
        for j in range(_TILES_N):
            _mma(_MMA_BF16, [acc[m, j, i] for i in range(4)], a, b, 0, j)


def _mma(instruction: str, c: list[Expr], a: Expr, b: Expr, step: int, j: int) -> None:
    T.evaluate(T.ptx[instruction](*c, *(a[i] for i in range(4)), b[step, j, 0], b[step, j, 1], *c))


def linear_tiles(N: int, K: int, dtype: str, rows: str, epilogue: str) -> PrimFunc:
    """Make the kernel (W, X, [R,] Y, T, ld_x, [ld_r,] ld_y) as that of `linear`, for rounded rows and such weights."""
    form = integer_format(dtype)
    kind: Any = Integers(form, K) if form else Halves(K)
    blocks, words = weight_blocks(N, epilogue), block_words(dtype, K)

    def body(w, x, y, tokens, ld_x, ld_y, r=None, ld_r=None) -> None:  # type: ignore[no-untyped-def]
        w = array(w, (blocks * words,), "uint32")
        x, y = array(x, (tokens, ld_x), "uint32"), array(y, (tokens, ld_y), "float32")
        residual = array(r, (tokens, ld_r), "float32") if r is not None else None
        grid = (ceil_div(blocks, WARPS), (tokens + (ROWS - 1)) // ROWS, 1)
        with threads(grid, (WARP, WARPS, 1)) as (bx, by, lane, warp):
            block, first = let("block", bx * WARPS + warp), let("first", by * ROWS)
            acc = local("acc", (_TILES_M, _TILES_N, 4))
            b = local("b", (kind.steps, _TILES_N, 2), "uint32")
            at = Warp(w, x, let("base", block * words), lane, let("word", lane % 4), tokens)
            with when(block < blocks):
                with T.grid(_TILES_M, _TILES_N, 4) as (m, j, i):
                    store(acc, T.float32(0), m, j, i)
                with T.serial(kind.parts) as part:
                    scales = kind.load(at, part, b)
                    with T.serial(_TILES_M) as m, when(first + m * _M < tokens):
                        kind.multiply(at, first + m * _M, part, b, scales, acc, m)
                with T.serial(_TILES_M) as m, when(first + m * _M < tokens):
                    _finish(N, epilogue, acc, m, first + m * _M, at, block, residual, y)

    types = {"w": "uint32", "x": "uint32", "r": "float32", "y": "float32"}
    return make_kernel(product_arguments({"epilogue": epilogue}), types, body)


def _finish(N, epilogue, acc, m, first, at: Warp, block, residual: Any, y) -> None:  # type: ignore[no-untyped-def]
    """Store 16 rows."""
    is_gated = epilogue == "swiglu"
    outputs, width = (N // 2, HALF) if is_gated else (N, BLOCK)
    for j in range(width // _N):
        for i in range(4):
            row = let("row", first + at.lane // 4 + i // 2 * 8)
            column = let("column", block * width + j * _N + at.word * 2 + i % 2)
            with when(row < at.tokens, column < outputs):
                value: Expr = acc[m, j, i]
                if is_gated:
                    value = silu(value) * acc[m, j + HALF // _N, i]
                if residual is not None:
                    value = residual[row, column] + value
                store(y, value, row, column)


def _grid(p: Parameters) -> Grid:
    blocks = weight_blocks(p["N"], p["epilogue"])
    return fixed(ceil_div(blocks, WARPS)), per_row(over=ROWS), ONE


LINEAR_TILES = Family(linear_tiles, product_arguments, writes="y", cost=product_cost, grid=_grid)
