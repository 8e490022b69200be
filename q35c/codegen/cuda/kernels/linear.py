"""Products of rows with packed matrices.

    y[t, n] = sum_k x[t, k] w[n, k]         + r[t, n]         or silu(gate) * up of neighbouring halves of a block

A block of threads makes 32 outputs of up to `tile` rows: its warps share the inputs, and meet in shared memory, where the
sums are added in the order of the warps. Each weight is read once for `tile` rows. The limit is the bandwidth of the weights.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost
from q35c.codegen.cuda.kernels.blocks import (
    block_words,
    multiply,
    row_type,
    units,
    weight_type,
)
from q35c.codegen.cuda.kernels.family import (
    F32_BYTES,
    ONE,
    WARP,
    Family,
    Grid,
    Parameters,
    ceil_div,
    fixed,
    peak_of,
    per_row,
    row_bytes,
)
from q35c.codegen.cuda.kernels.make import T, array, let, local, make_kernel, shared, store
from q35c.codegen.cuda.kernels.threads import barrier, silu, threads, when
from q35c.layouts.weights import BLOCK

WARPS = 8
HALF = BLOCK // 2


def linear(N: int, K: int, dtype: str, rows: str, epilogue: str, tile: int) -> PrimFunc:
    """Make the kernel (W, X, [R,] Y, T, ld_x, [ld_r,] ld_y) for X [T, K] and Y f32 [T, N], [T, N / 2] with "swiglu".

    `rows` is the dtype of X; `epilogue` is none, residual (R f32 [T, N] is added) or swiglu.
    """
    blocks, words, parts = weight_blocks(N, epilogue), block_words(dtype, K), units(dtype, K)
    outputs = N // 2 if epilogue == "swiglu" else N
    columns = HALF if epilogue == "swiglu" else BLOCK

    def body(w, x, y, tokens, ld_x, ld_y, r=None, ld_r=None) -> None:  # type: ignore[no-untyped-def]
        w = array(w, (blocks * words,), weight_type(dtype))
        x = array(x, (tokens, ld_x), row_type(rows))
        y = array(y, (tokens, ld_y), "float32")
        residual = array(r, (tokens, ld_r), "float32") if r is not None else None
        grid = (blocks, (tokens + (tile - 1)) // tile, 1)
        with threads(grid, (WARP, WARPS, 1)) as (block, by, lane, warp):
            acc = local("acc", (tile,))
            sums = shared("sums", (WARPS, tile, BLOCK))
            first = let("row", by * tile)
            for i in range(tile):
                store(acc, T.float32(0), i)
            with T.serial(ceil_div(parts, WARPS)) as i:
                unit = let("unit", i * WARPS + warp)
                with when(unit < parts):
                    multiply(
                        K, dtype, rows, w, block * words, lane, unit,
                        lambda at, word: x[T.min(first + at, tokens - 1), word], acc, tile,
                    )  # fmt: skip
            for i in range(tile):
                store(sums, acc[i], warp, i, lane)
            barrier()
            with T.serial(ceil_div(tile, WARPS)) as i:
                at = let("at", i * WARPS + warp)
                column = let("column", block * columns + lane)
                with when(at < tile, first + at < tokens, lane < columns, column < outputs):
                    value = let("value", total(sums, at, lane))
                    if epilogue == "swiglu":
                        value = silu(value) * total(sums, at, lane + HALF)
                    if residual is not None:
                        value = residual[first + at, column] + value
                    store(y, value, first + at, column)

    parameters = {"epilogue": epilogue}
    types = {"w": weight_type(dtype), "x": row_type(rows), "r": "float32", "y": "float32"}
    return make_kernel(_arguments(parameters), types, body)


def total(sums: Any, r: Any, lane: Any) -> Any:
    """Return the sum over the warps, in their order."""
    value = sums[0, r, lane]
    for warp in range(1, WARPS):
        value = value + sums[warp, r, lane]
    return value


def weight_blocks(N: int, epilogue: str) -> int:
    """Return how many blocks a matrix of N rows has: of a swiglu both halves begin a block."""
    return ceil_div(N // 2, HALF) if epilogue == "swiglu" else ceil_div(N, BLOCK)


def _arguments(p: Parameters) -> str:
    if p["epilogue"] == "residual":
        return "w x r y tokens ld_x ld_r ld_y"
    return "w x y tokens ld_x ld_y"


def _cost(p: Parameters) -> Cost:
    outputs = p["N"] // 2 if p["epilogue"] == "swiglu" else p["N"]
    moved = outputs * F32_BYTES * (2 if p["epilogue"] == "residual" else 1)
    return Cost(
        peak_of(p["rows"]),
        weight_share=1,
        cached_bytes_per_token=row_bytes(p["K"], p["rows"]) + moved,
        operations_per_token=2 * p["N"] * p["K"],
    )


def _grid(p: Parameters) -> Grid:
    return fixed(weight_blocks(p["N"], p["epilogue"])), per_row(over=p["tile"]), ONE


LINEAR = Family(linear, _arguments, writes="y", cost=_cost, grid=_grid)
