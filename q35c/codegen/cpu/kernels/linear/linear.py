"""Linear layers over packed weights: Y = X W^T, plus a residual, or silu(gate) * up.

    none      y[t, n] = sum_k x[t, k] w[n, k]
    residual  y[t, n] = r[t, n] + sum_k x[t, k] w[n, k]
    swiglu    y[t, i] = silu(sum_k x[t, k] gate[i, k]) * sum_k x[t, k] up[i, k]

Threads split the blocks of 32 output columns, or, where there are one or two, the rows. A thread keeps one block in L2 (128 or 64 bytes a k)
while all rows pass it, a tile of rows at a time (products/float_tile.py, products/pair_tile.py, products/integer_tile.py). One row reads each weight once, in one
contiguous stream: the limit is memory bandwidth. Many rows: the limit is the rate of the instruction that multiplies
and adds.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost, Division
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.family import (
    F32_BYTES,
    Family,
    Parameters,
    Room,
    peak_of,
    rounded_bytes,
    row_bytes,
    weight_bytes,
)
from q35c.codegen.cpu.kernels.products.choose import make_product
from q35c.codegen.cpu.kernels.products.product import Operands, Product
from q35c.codegen.cpu.kernels.products.rounded_blocks import (
    RoundedRows,
    rounding_scratch,
    sweep_rounded,
)
from q35c.codegen.cpu.kernels.rows.round_int8 import Rounding
from q35c.codegen.cpu.kernels.vectors import Expr, share
from q35c.layouts.weights import BLOCK, ceil_div

FEW_BLOCKS = 2  # too few to split among threads


def linear(
    N: int, K: int, dtype: str, epilogue: str, isa: Isa, rows: str = "f32", group: int = 0
) -> PrimFunc:
    """Make the kernel (W, X, Y, [R], T, ld_x, ld_y, [ld_r], tid, nt) for X f32 [T, K].

    W holds N rows packed as f32, bf16 pairs or integers; swiglu counts gate and up rows in N and writes
    N/2 columns. Integer weights read X as `quantize_rows` leaves it, and bf16 weights as `round_rows` does when
    `rows` is "bf16". R and ld_r exist only with "residual"; R may be Y itself. With "swiglu" and a `group`, of which N/2
    is a multiple, (W, X, Q, SCRATCH f32 [T N/2 / group + threads T, group], ARRIVALS i32 [N/2 / group] of zeros, T, ld_x, ld_q,
    worker, tid, nt): only Q remains, what `quantize_rows` makes of Y. Strides are in elements of 4 bytes.
    """
    matmul = make_product(N, K, dtype, epilogue, isa, rows)
    if group:
        return _rounding(matmul, Rounding(N // 2, group, isa))
    return _with_residual(matmul) if epilogue == "residual" else _plain(matmul)


def _plain(matmul: Product) -> PrimFunc:
    @T.prim_func(private=True, s_tir=True)
    def linear_kernel(
        W: T.handle(matmul.element),
        X: T.handle(matmul.x_element),
        Y: T.handle("float32"),
        tokens: T.int64,
        ld_x: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        w = matmul.weights(W)
        x = T.decl_buffer((tokens, ld_x), matmul.x_element, data=X)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        _blocks(matmul, w, x, y, y, tokens, tid, nt)
        return T.int32(0)

    return linear_kernel


def _with_residual(matmul: Product) -> PrimFunc:
    @T.prim_func(private=True, s_tir=True)
    def linear_residual_kernel(
        W: T.handle(matmul.element),
        X: T.handle(matmul.x_element),
        Y: T.handle("float32"),
        R: T.handle("float32"),
        tokens: T.int64,
        ld_x: T.int64,
        ld_y: T.int64,
        ld_r: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        # No noalias: R may be Y.
        w = matmul.weights(W)
        x = T.decl_buffer((tokens, ld_x), matmul.x_element, data=X)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        r = T.decl_buffer((tokens, ld_r), "float32", data=R)
        _blocks(matmul, w, x, y, r, tokens, tid, nt)
        return T.int32(0)

    return linear_residual_kernel


def _rounding(matmul: Product, rounding: Rounding) -> PrimFunc:
    groups = rounding.layout.groups

    @T.prim_func(private=True, s_tir=True)
    def linear_rounding_kernel(
        W: T.handle(matmul.element),
        X: T.handle(matmul.x_element),
        Q: T.handle("int32"),
        SCRATCH: T.handle("float32"),
        ARRIVALS: T.handle("int32"),
        tokens: T.int64,
        ld_x: T.int64,
        ld_q: T.int64,
        worker: T.int32,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        # No noalias: other threads write to SCRATCH.
        w = matmul.weights(W)
        x = T.decl_buffer((tokens, ld_x), matmul.x_element, data=X)
        q = T.decl_buffer((tokens, ld_q), "int32", data=Q)
        scratch = T.decl_buffer(
            (tokens * (groups + worker + 1), rounding.group), "float32", data=SCRATCH
        )
        arrivals = T.decl_buffer((groups,), "int32", data=ARRIVALS)
        # Whole groups where they suffice for all: no thread has to meet another.
        grain: T.let[T.int64] = T.Select(nt <= groups, T.int64(matmul.blocks // groups), T.int64(1))
        grains: T.let[T.int64] = T.truncdiv(T.int64(matmul.blocks), grain)
        first: T.let[T.int64] = share(grains, tid, nt) * grain
        last: T.let[T.int64] = share(grains, tid + 1, nt) * grain
        sweep_rounded(
            matmul,
            rounding,
            Operands(w, x, scratch, scratch, T.int64(0), T.int64(0), _same, _same),
            RoundedRows(q, (groups + worker) * tokens, tokens, T.int64(0), arrivals, T.int64(0)),
            (first, last),
            (T.int64(0), tokens),
        )
        return T.int32(0)

    return linear_rounding_kernel


def _blocks(
    matmul: Product, w: Expr, x: Expr, y: Expr, r: Expr, tokens: Expr, tid: Expr, nt: Expr
) -> None:
    """Emit this thread's share: of the blocks, or of the rows where the blocks are few."""

    def sweep(block: Expr, begin: Expr, end: Expr) -> None:
        matmul.sweep(Operands(w, x, y, r, block, block, _same, _same), begin, end)

    is_narrow = matmul.blocks <= FEW_BLOCKS
    items = tokens if is_narrow else matmul.blocks
    first, last = T.Bind(share(items, tid, nt)), T.Bind(share(items, tid + 1, nt))
    if is_narrow:
        with T.serial(T.int64(matmul.blocks)) as block:
            sweep(block, first, last)
    else:
        with T.serial(last - first) as item:
            sweep(T.Bind(first + item), T.int64(0), tokens)


def _same(position: Expr) -> Expr:
    return position


def _scratch(p: Parameters, room: Room) -> int:
    return rounding_scratch(p["group"], p["N"] // 2, room)


def _division(p: Parameters) -> Division | None:
    blocks = ceil_div(p["N"], BLOCK)
    if blocks <= FEW_BLOCKS:
        return None  # they are split by rows, which share more of what is unpacked if they stay together
    # Columns that are rounded stay in groups.
    most = p["N"] // 2 // p["group"] if p.get("group") else blocks
    return Division(most, weight_bytes(p["N"], p["K"], p["dtype"]))


def _cost(p: Parameters) -> Cost:
    outputs = p["N"] // 2 if p["epilogue"] == "swiglu" else p["N"]
    moved = outputs * F32_BYTES * (2 if p["epilogue"] == "residual" else 1)
    return Cost(
        peak_of(p["rows"]),
        weight_share=1,
        cached_bytes_per_token=row_bytes(p["K"], p["rows"]) + (rounded_bytes(p, outputs) or moved),
        operations_per_token=2 * p["N"] * p["K"],
    )


def _arguments(p: Parameters) -> str:
    if p.get("group"):
        return "w x q scratch arrivals tokens ld_x ld_q worker"
    return (
        "w x y r tokens ld_x ld_y ld_r" if p["epilogue"] == "residual" else "w x y tokens ld_x ld_y"
    )


LINEAR = Family(
    linear,
    _arguments,
    writes="y q scratch arrivals",
    cost=_cost,
    scratch=_scratch,
    division=_division,
)
