"""Products of rows with packed matrices.

    y[t, n] = sum_k x[t, k] w[n, k]         + r[t, n]         or silu(gate) * up of neighbouring halves of a block

A block of threads makes 32 outputs of up to `tile` rows: its warps share the inputs, and meet in shared memory, where the
sums are added in the order of the warps. Each weight is read once for `tile` rows. The limit is the bandwidth of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost
from q35c.codegen.cuda.kernels.blocks import (
    block_words,
    multiply,
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
from q35c.codegen.cuda.kernels.make import Expr, T, array, let, local, make_kernel, shared, store
from q35c.codegen.cuda.kernels.prologue import WARPS, Prologue, prologue_arguments
from q35c.codegen.cuda.kernels.threads import barrier, silu, threads, when
from q35c.layouts.weights import BLOCK

HALF = BLOCK // 2


def linear(
    N: int, K: int, dtype: str, rows: str, epilogue: str, tile: int, prologue: str = "none", eps: float = 0.0, offset: float = 0.0,
    head_dim: int = 0,
) -> PrimFunc:  # fmt: skip
    """Make the kernel (W, X, [NORM,] [GATE,] [R,] Y, T, ld_x, [ld_gate,] [ld_r,] ld_y) for X [T, K] and Y f32 [T, N], [T, N / 2] with "swiglu".

    `rows` is the dtype of the rows that W meets: that of X, or what a prologue (prologue.py) makes of f32 rows X; its "norm"
    takes NORM f32 [K], "gated" NORM f32 [head_dim] and GATE f32 [T, K]. `epilogue` is none, residual (R f32 [T, N] is added) or swiglu.
    """
    blocks, words, parts = weight_blocks(N, epilogue), block_words(dtype, K), units(dtype, K)
    outputs = N // 2 if epilogue == "swiglu" else N
    columns = HALF if epilogue == "swiglu" else BLOCK
    first_steps = Prologue(prologue, K, rows, eps, offset, head_dim)

    def body(
        w, x, y, tokens, ld_x, ld_y, norm=None, gate=None, ld_gate=None, r=None, ld_r=None
    ) -> None:  # type: ignore[no-untyped-def]
        w = array(w, (blocks * words,), weight_type(dtype))
        x = array(x, (tokens, ld_x), first_steps.row_type)
        y = array(y, (tokens, ld_y), "float32")
        norm, gate = first_steps.arrays(norm, gate, tokens, ld_gate)
        residual = array(r, (tokens, ld_r), "float32") if r is not None else None
        grid = (blocks, (tokens + (tile - 1)) // tile, 1)
        with threads(grid, (WARP, WARPS, 1)) as (block, by, lane, warp):
            acc = local("acc", (tile,))
            sums = shared("sums", (WARPS, tile, BLOCK))
            first = let("row", by * tile)
            count = let("count", T.min(tokens - first, tile))

            def read(at: int, word: Expr) -> Expr:
                return x[T.min(first + at, tokens - 1), word]

            if first_steps.is_needed:
                staged = first_steps.stage(
                    x, norm, gate, lambda at: first + at, count, tile, lane, warp
                )

                def read(at: int, word: Expr) -> Expr:
                    return staged[T.min(at, count - 1) if at else 0, word]

            def accumulate(rows_here: int) -> None:
                with T.serial(ceil_div(parts, WARPS)) as i:
                    unit = let("unit", i * WARPS + warp)
                    with when(unit < parts):
                        multiply(K, dtype, rows, w, block * words, lane, unit, read, acc, rows_here)

            for i in range(tile):
                store(acc, T.float32(0), i)
            for_one_or(tile, count, accumulate)
            for i in range(tile):
                store(sums, acc[i], warp, i, lane)
            barrier()
            with T.serial(ceil_div(tile, WARPS)) as i:
                at = let("at", i * WARPS + warp)
                column = let("column", block * columns + lane)
                with when(at < count, lane < columns, column < outputs):
                    value = let("value", total(sums, at, lane))
                    if epilogue == "swiglu":
                        value = silu(value) * total(sums, at, lane + HALF)
                    if residual is not None:
                        value = residual[first + at, column] + value
                    store(y, value, first + at, column)

    parameters = {"epilogue": epilogue, "prologue": prologue}
    types = {"w": weight_type(dtype), "x": first_steps.row_type}
    types |= dict.fromkeys(("norm", "gate", "r", "y"), "float32")
    return make_kernel(product_arguments(parameters), types, body)


def for_one_or(tile: int, count: Expr, emit: Callable[[int], None]) -> None:
    """Emit statements for a tile of rows, and a version of them for one row, which is most of what decoding has."""
    if tile == 1:
        emit(1)
        return
    with T.If(count == 1):
        with T.Then():
            emit(1)
        with T.Else():
            emit(tile)


def total(sums: Any, r: Any, lane: Any) -> Any:
    """Return the sum over the warps, in their order."""
    value = sums[0, r, lane]
    for warp in range(1, WARPS):
        value = value + sums[warp, r, lane]
    return value


def weight_blocks(N: int, epilogue: str) -> int:
    """Return how many blocks a matrix of N rows has: of a swiglu both halves begin a block."""
    return ceil_div(N // 2, HALF) if epilogue == "swiglu" else ceil_div(N, BLOCK)


def product_arguments(p: Parameters) -> str:
    """Return what a product takes."""
    norm, ld_gate = prologue_arguments(p)
    if p["epilogue"] == "residual":
        return f"w x{norm} r y tokens ld_x{ld_gate} ld_r ld_y"
    return f"w x{norm} y tokens ld_x{ld_gate} ld_y"


def product_cost(p: Parameters) -> Cost:
    """Return what a product of rows with a matrix must do."""
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


LINEAR = Family(linear, product_arguments, writes="y", cost=product_cost, grid=_grid)
