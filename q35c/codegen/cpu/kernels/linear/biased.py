"""Linear layers with a bias: Y = X W^T + B, the GELU of that, or that plus a residual; rounded to bf16 on the way if asked.

    bias           y[t, n] = b[n] + sum_k x[t, k] w[n, k]
    gelu_*         y[t, n] = gelu(b[n] + sum_k x[t, k] w[n, k])
    bias_residual  y[t, n] = r[t, n] + b[n] + sum_k x[t, k] w[n, k]

These come from pictures, whose rows are thousands: a thread takes CHUNK rows, which stay in L2, through all its blocks of
32 output columns, so that what streams past is the weights, once for each chunk. The limit is that of products/.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost, Division
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.family import (
    EXP_OPERATIONS,
    F32_BYTES,
    Family,
    Parameters,
    peak_of,
    row_bytes,
    weight_bytes,
)
from q35c.codegen.cpu.kernels.products.choose import make_product
from q35c.codegen.cpu.kernels.products.product import Operands, Product
from q35c.codegen.cpu.kernels.rows.round_bf16 import bf16_element
from q35c.codegen.cpu.kernels.vectors import Expr, share
from q35c.layouts.weights import BLOCK, ceil_div

CHUNK = 256  # rows: of 1024 bf16 values, half of a small L2


def linear_bias(
    N: int, K: int, dtype: str, epilogue: str, isa: Isa, rows: str = "f32", result: str = "f32"
) -> PrimFunc:
    """Make the kernel (W, B f32 [N], X, Y, [R], T, ld_x, ld_y, [ld_r], tid, nt) for N outputs of K inputs.

    N is even. W, X, R and strides are those of `linear`; Y has rows as `round_rows` leaves them if the `result` is "bf16".
    """
    is_rounded = result == "bf16"
    matmul = make_product(N, K, dtype, epilogue, isa, rows, is_rounded)
    element, halves = bf16_element(isa) if is_rounded else ("float32", 1)
    if epilogue.endswith("residual"):
        return _with_residual(matmul, element, halves)

    @T.prim_func(private=True, s_tir=True)
    def linear_bias_kernel(
        W: T.handle(matmul.element),
        B: T.handle("float32"),
        X: T.handle(matmul.x_element),
        Y: T.handle(element),
        tokens: T.int64,
        ld_x: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        w = matmul.weights(W)
        b = T.decl_buffer((N,), "float32", data=B)
        x = T.decl_buffer((tokens, ld_x), matmul.x_element, data=X)
        y = T.decl_buffer((tokens, ld_y * halves), element, data=Y)
        _chunks(matmul, w, b, x, y, y, tokens, tid, nt)
        return T.int32(0)

    return linear_bias_kernel


def _with_residual(matmul: Product, element: str, halves: int) -> PrimFunc:
    @T.prim_func(private=True, s_tir=True)
    def linear_bias_residual_kernel(
        W: T.handle(matmul.element),
        B: T.handle("float32"),
        X: T.handle(matmul.x_element),
        Y: T.handle(element),
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
        b = T.decl_buffer((matmul.N,), "float32", data=B)
        x = T.decl_buffer((tokens, ld_x), matmul.x_element, data=X)
        y = T.decl_buffer((tokens, ld_y * halves), element, data=Y)
        r = T.decl_buffer((tokens, ld_r), "float32", data=R)
        _chunks(matmul, w, b, x, y, r, tokens, tid, nt)
        return T.int32(0)

    return linear_bias_residual_kernel


def _chunks(
    matmul: Product, w: Expr, b: Expr, x: Expr, y: Expr, r: Expr, tokens: Expr, tid: Expr, nt: Expr
) -> None:
    """Emit this thread's share of the blocks, for one chunk of rows after another."""
    first, last = T.Bind(share(matmul.blocks, tid, nt)), T.Bind(share(matmul.blocks, tid + 1, nt))
    with T.serial(T.truncdiv(tokens + (CHUNK - 1), T.int64(CHUNK))) as chunk:
        begin = T.Bind(chunk * CHUNK)
        end = T.Bind(T.min(begin + CHUNK, tokens))
        with T.serial(last - first) as item:
            block = T.Bind(first + item)
            matmul.sweep(Operands(w, x, y, r, block, block, _same, _same, b), begin, end)


def _same(position: Expr) -> Expr:
    return position


def _cost(p: Parameters) -> Cost:
    written = row_bytes(p["N"], p["result"])
    moved = written + (F32_BYTES * p["N"] if p["epilogue"].endswith("residual") else 0)
    activated = EXP_OPERATIONS * p["N"] if p["epilogue"].startswith("gelu") else 0
    return Cost(
        peak_of(p["rows"]),
        weight_share=1,
        cached_bytes_per_token=row_bytes(p["K"], p["rows"]) + moved,
        operations_per_token=2 * p["N"] * p["K"] + activated,
    )


LINEAR_BIAS = Family(
    linear_bias,
    lambda p: (
        "w b x y r tokens ld_x ld_y ld_r"
        if p["epilogue"].endswith("residual")
        else "w b x y tokens ld_x ld_y"
    ),
    writes="y",
    cost=_cost,
    division=lambda p: Division(ceil_div(p["N"], BLOCK), weight_bytes(p["N"], p["K"], p["dtype"])),
)
