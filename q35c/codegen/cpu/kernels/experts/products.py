"""Products of routed experts: each weight in use is read once, whatever number of tokens chose it.

Pairs (token, choice) come sorted by expert (routing.py); rows are gathered in place. The weights of the experts in use are
the limit at few tokens, the rate of the instruction that multiplies and adds at many.
"""

from __future__ import annotations

from collections.abc import Callable

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

# Reading one block of weights from memory costs about as much as computing this many rows.
BLOCK_COST_ROWS = 8

Range = tuple[Expr, Expr]  # from the first to before the last


def expert_gate_up(
    E: int,
    I: int,  # noqa: E741
    H: int,
    top_k: int,
    dtype: str,
    isa: Isa,
    rows: str = "f32",
    group: int = 0,
) -> PrimFunc:
    """Make the kernel (W, X f32 [T, H], ORDER, ACTIVE, OFFSETS, COUNT, Y f32 [T*k, I], T, ld_x, tid, nt).

    W holds the packed swiglu blocks of expert 0, then of expert 1 and so on. Row p of Y belongs to
    pair p. With a `group`, of which I is a multiple, (W, X, ORDER, ACTIVE, OFFSETS, COUNT, Q, SCRATCH
    f32 [T k I / group + threads T, group], ARRIVALS i32 [E I / group] of zeros, T, ld_x, ld_q, worker, tid, nt): only Q
    remains, what `quantize_rows` makes of the rows of Y.
    """
    matmul = make_product(2 * I, H, dtype, "swiglu", isa, rows)
    if group:
        return _gate_up_rounding(matmul, Rounding(I, group, isa), E, top_k)

    @T.prim_func(private=True, s_tir=True)
    def expert_gate_up_kernel(
        W: T.handle(matmul.element),
        X: T.handle(matmul.x_element),
        ORDER: T.handle("int32"),
        ACTIVE: T.handle("int32"),
        OFFSETS: T.handle("int32"),
        COUNT: T.handle("int32"),
        Y: T.handle("float32"),
        tokens: T.int64,
        ld_x: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        w = matmul.weights(W, E)
        x = T.decl_buffer((tokens, ld_x), matmul.x_element, data=X)
        y = T.decl_buffer((tokens * top_k, I), "float32", data=Y)
        order = T.decl_buffer((tokens * top_k,), "int32", data=ORDER)
        active = T.decl_buffer((E,), "int32", data=ACTIVE)
        offsets = T.decl_buffer((E + 1,), "int32", data=OFFSETS)
        count = T.decl_buffer((1,), "int32", data=COUNT)
        _experts(matmul, (w, x, y), (order, active, offsets, count), top_k, tid, nt)
        return T.int32(0)

    return expert_gate_up_kernel


def _gate_up_rounding(matmul: Product, rounding: Rounding, E: int, top_k: int) -> PrimFunc:
    groups = rounding.layout.groups

    @T.prim_func(private=True, s_tir=True)
    def expert_gate_up_rounding_kernel(
        W: T.handle(matmul.element),
        X: T.handle(matmul.x_element),
        ORDER: T.handle("int32"),
        ACTIVE: T.handle("int32"),
        OFFSETS: T.handle("int32"),
        COUNT: T.handle("int32"),
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
        w = matmul.weights(W, E)
        x = T.decl_buffer((tokens, ld_x), matmul.x_element, data=X)
        q = T.decl_buffer((tokens * top_k, ld_q), "int32", data=Q)
        rows: T.let[T.int64] = tokens * (top_k * groups + worker + 1)
        scratch = T.decl_buffer((rows, rounding.group), "float32", data=SCRATCH)
        arrivals = T.decl_buffer((E * groups,), "int32", data=ARRIVALS)
        order = T.decl_buffer((tokens * top_k,), "int32", data=ORDER)
        active = T.decl_buffer((E,), "int32", data=ACTIVE)
        offsets = T.decl_buffer((E + 1,), "int32", data=OFFSETS)
        count = T.decl_buffer((1,), "int32", data=COUNT)
        _rounded_experts(
            (matmul, rounding),
            (w, x, q, scratch, arrivals),
            (order, active, offsets, count),
            top_k,
            (tokens * (top_k * groups + worker), tokens, tid, nt),
        )
        return T.int32(0)

    return expert_gate_up_rounding_kernel


def expert_down(
    E: int,
    H: int,
    I: int,  # noqa: E741
    top_k: int,
    dtype: str,
    isa: Isa,
    rows: str = "f32",
) -> PrimFunc:
    """Make the kernel (W, Y1 [T*k, I], ORDER, ACTIVE, OFFSETS, COUNT, Y2 f32 [T*k, H], T, ld_y1, tid, nt).

    W holds the packed blocks of H rows of expert 0, then of expert 1 and so on. Rows are pairs.
    """
    matmul = make_product(H, I, dtype, "none", isa, rows)

    @T.prim_func(private=True, s_tir=True)
    def expert_down_kernel(
        W: T.handle(matmul.element),
        Y1: T.handle(matmul.x_element),
        ORDER: T.handle("int32"),
        ACTIVE: T.handle("int32"),
        OFFSETS: T.handle("int32"),
        COUNT: T.handle("int32"),
        Y2: T.handle("float32"),
        tokens: T.int64,
        ld_y1: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        w = matmul.weights(W, E)
        x = T.decl_buffer((tokens * top_k, ld_y1), matmul.x_element, data=Y1)
        y = T.decl_buffer((tokens * top_k, H), "float32", data=Y2)
        order = T.decl_buffer((tokens * top_k,), "int32", data=ORDER)
        active = T.decl_buffer((E,), "int32", data=ACTIVE)
        offsets = T.decl_buffer((E + 1,), "int32", data=OFFSETS)
        count = T.decl_buffer((1,), "int32", data=COUNT)
        _experts(matmul, (w, x, y), (order, active, offsets, count), 1, tid, nt)
        return T.int32(0)

    return expert_down_kernel


def _experts(
    matmul: Product,
    data: tuple[Expr, Expr, Expr],
    groups: tuple[Expr, Expr, Expr, Expr],
    pairs_per_row: int,
    tid: Expr,
    nt: Expr,
) -> None:
    """Emit this thread's share of the (active expert, block) products; x row = pair // pairs_per_row."""
    w, x, y = data
    pair, x_row = _rows(groups[0], pairs_per_row)

    def emit(expert: Expr, base: Expr, blocks: Range, positions: Range) -> None:
        first, last = blocks
        with T.serial(last - first) as item:
            block = T.Bind(first + item)
            matmul.sweep(Operands(w, x, y, y, base + block, block, x_row, pair), *positions)

    _share_experts(matmul.blocks, groups, (tid, nt), emit)


def _rounded_experts(
    kinds: tuple[Product, Rounding],
    data: tuple[Expr, Expr, Expr, Expr, Expr],
    groups: tuple[Expr, Expr, Expr, Expr],
    pairs_per_row: int,
    run: tuple[Expr, Expr, Expr, Expr],
) -> None:
    """Emit what `_experts` does, and the rounding of its rows. Cut groups lie in scratch by pair, then by group."""
    (matmul, rounding), (w, x, q, scratch, arrivals), (own, tokens, tid, nt) = kinds, data, run
    pair, x_row = _rows(groups[0], pairs_per_row)
    per_row = rounding.layout.groups

    def emit(expert: Expr, base: Expr, blocks: Range, positions: Range) -> None:
        # More rows than tokens: one whose logits are not finite chooses an expert more than once.
        rows = RoundedRows(q, own, tokens, positions[0] * per_row, arrivals, expert * per_row)
        operands = Operands(w, x, scratch, scratch, base, T.int64(0), x_row, pair)
        sweep_rounded(matmul, rounding, operands, rows, blocks, positions)

    _share_experts(matmul.blocks, groups, (tid, nt), emit)


def _rows(order: Expr, pairs_per_row: int) -> tuple[Callable[[Expr], Expr], Callable[[Expr], Expr]]:
    """Return what gives the pair at a position, and the row of X that it reads."""

    def pair(position: Expr) -> Expr:
        return _wide(order[position])

    return pair, lambda position: T.truncdiv(pair(position), pairs_per_row)


def _share_experts(
    blocks: int,
    groups: tuple[Expr, Expr, Expr, Expr],
    thread: tuple[Expr, Expr],
    emit: Callable[[Expr, Expr, Range, Range], None],
) -> None:
    """Emit this thread's blocks of each active expert: emit(its number, its first block in W, blocks, positions).

    An expert costs its rows and a constant for each block; the sum over the experts before it is
    OFFSETS plus that constant times their number. Thread boundaries lie at equal parts of the
    whole cost, so that neither many experts with a row nor one with all of them leaves threads idle.
    """
    (_, active, offsets, count), (tid, nt) = groups, thread
    experts = T.Bind(T.cast(count[0], "int64"))
    whole = T.Bind((_wide(offsets[count[0]]) + experts * BLOCK_COST_ROWS) * blocks)
    low, high = T.Bind(share(whole, tid, nt)), T.Bind(share(whole, tid + 1, nt))
    with T.serial(experts) as a:
        begin, end = T.Bind(_wide(offsets[a])), T.Bind(_wide(offsets[a + 1]))
        cost = T.Bind(end - begin + BLOCK_COST_ROWS)
        before = T.Bind((begin + a * BLOCK_COST_ROWS) * blocks)
        first, last = (T.Bind(_blocks_before(t, before, cost, blocks)) for t in (low, high))
        emit(a, T.Bind(_wide(active[a]) * blocks), (first, last), (begin, end))


def _blocks_before(boundary: Expr, before: Expr, cost: Expr, blocks: int) -> Expr:
    """Return how many of an expert's blocks lie before a boundary in cost."""
    return T.min(T.truncdiv(T.max(boundary - before, T.int64(0)), cost), T.int64(blocks))


def _wide(value: Expr) -> Expr:
    return T.cast(value, "int64")


def _scratch(p: Parameters, room: Room) -> int:
    return rounding_scratch(p["group"], p["top_k"] * p["I"], room)


def _division(p: Parameters, N: int, K: int) -> Division:
    blocks, size = ceil_div(N, BLOCK), weight_bytes(N, K, p["dtype"])
    return Division(p["top_k"] * blocks, p["top_k"] * size)


def _cost(p: Parameters, inputs: int, products: int, written: float) -> Cost:
    """Of the experts those count that some token chose; a shared one among them, every token's choice, like the others."""
    return Cost(
        peak_of(p["rows"]),
        weight_share=p["top_k"] / p["E"],
        cached_bytes_per_token=p["top_k"] * (row_bytes(inputs, p["rows"]) + written),
        operations_per_token=2 * p["top_k"] * products,
    )


def _gate_up_cost(p: Parameters) -> Cost:
    written = rounded_bytes(p, p["I"]) or p["I"] * F32_BYTES
    return _cost(p, p["H"], 2 * p["I"] * p["H"], written)


_GROUPS = "order active offsets count"


def _gate_up_arguments(p: Parameters) -> str:
    if p.get("group"):
        return f"w x {_GROUPS} q scratch arrivals tokens ld_x ld_q worker"
    return f"w x {_GROUPS} y tokens ld_x"


EXPERT_GATE_UP = Family(
    expert_gate_up,
    _gate_up_arguments,
    writes="y q scratch arrivals",
    cost=_gate_up_cost,
    scratch=_scratch,
    division=lambda p: _division(p, 2 * p["I"], p["H"]),
)
EXPERT_DOWN = Family(
    expert_down,
    f"w y1 {_GROUPS} y2 tokens ld_y1",
    writes="y2",
    cost=lambda p: _cost(p, p["I"], p["I"] * p["H"], p["H"] * F32_BYTES),
    division=lambda p: _division(p, p["H"], p["I"]),
)
