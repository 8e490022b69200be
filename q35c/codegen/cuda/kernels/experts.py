"""Sparse mixture of experts: the choice of experts, and their products for each pair of a token and a choice.

    route           ids and weights of the top_k experts of each token, softmax renormalised over them
    expert_gate_up  y1[p] = silu(gate_e x[p // top_k]) * up_e x[p // top_k]       for pair p of expert e
    expert_down     y2[p] = down_e y1[p]

A pair is numbered token * top_k + choice. Each pair reads its expert's weights: right for any number of tokens, and as
little as can be for one. The limit is the bandwidth of the weights.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost
from q35c.codegen.cuda.kernels.blocks import (
    Line,
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
    elementwise,
    fixed,
    peak_of,
    per_row,
    row_bytes,
)
from q35c.codegen.cuda.kernels.linear import HALF, total, weight_blocks
from q35c.codegen.cuda.kernels.make import (
    Expr,
    T,
    add,
    array,
    let,
    local,
    make_kernel,
    shared,
    store,
)
from q35c.codegen.cuda.kernels.prologue import WARPS, Prologue, prologue_arguments, prologue_of
from q35c.codegen.cuda.kernels.threads import barrier, shuffle_xor, sigmoid, silu, threads, when
from q35c.layouts.weights import BLOCK

_ROUTE = "logits gate ids weights tokens ld_logits ld_gate"
_LEAST = -3.0e38  # what counts as the least of logits
_TAKEN = -3.4e38  # a choice that was made


def route(E: int, top_k: int, has_shared: bool) -> PrimFunc:
    """Make the kernel (LOGITS f32 [T, E], GATE [T, 1], IDS i32 [T, k], WEIGHTS f32 [T, k], T, ld_logits, ld_gate).

    The top_k largest in falling order (of equals the lowest id), softmax over all experts, divided by their sum; k is top_k.
    With `has_shared` k is one more, expert E with weight sigmoid(GATE); else GATE is not read. Ids are valid whatever the
    logits are. A warp has a token.
    """
    mine, choices = ceil_div(E, WARP), top_k + has_shared

    def body(logits, gate, ids, weights, tokens, ld_logits, ld_gate) -> None:  # type: ignore[no-untyped-def]
        logits, gate = (
            array(logits, (tokens, ld_logits), "float32"),
            array(gate, (tokens, ld_gate), "float32"),
        )
        ids, weights = (
            array(ids, (tokens, choices), "int32"),
            array(weights, (tokens, choices), "float32"),
        )
        with threads((tokens, 1, 1), (WARP, 1, 1)) as (row, lane):
            scores, chosen = local("scores", (mine,)), local("chosen", (top_k,))
            best, which = local("best", (1,)), local("which", (1,), "int32")
            for i in range(mine):
                expert = i * WARP + lane
                store(scores, T.float32(_LEAST), i)
                with when(expert < E):
                    # Not a number counts as the least: the comparison fails.
                    value = let("value", logits[row, expert])
                    store(scores, T.Select(value > T.float32(_LEAST), value, T.float32(_LEAST)), i)
            for choice in range(top_k):
                _find_best(scores, best, which, lane, mine, E)
                store(chosen, best[0], choice)
                with when(lane == 0):
                    store(ids, which[0], row, choice)
                for i in range(mine):
                    with when(which[0] == i * WARP + lane):
                        store(scores, T.float32(_TAKEN), i)
            # Divided by their sum, the others' part of the softmax falls out.
            sums = local("sums", (1,))
            store(sums, T.float32(0), 0)
            for choice in range(top_k):
                add(sums, T.exp(chosen[choice] - chosen[0]), 0)
            with when(lane == 0):
                for choice in range(top_k):
                    share = T.exp(chosen[choice] - chosen[0]) / sums[0]
                    store(weights, share, row, choice)
                if has_shared:
                    store(ids, E, row, top_k)
                    store(weights, sigmoid(gate[row, 0]), row, top_k)

    types = {"logits": "float32", "gate": "float32", "ids": "int32", "weights": "float32"}
    return make_kernel(_ROUTE, types, body)


def _find_best(scores, best, which, lane, mine: int, E: int) -> None:  # type: ignore[no-untyped-def]
    """Let best[0] and which[0] be the largest score of the warp and its expert, of equals the lowest."""
    store(best, scores[0], 0)
    store(which, T.min(lane, E - 1), 0)
    for i in range(1, mine):
        with when(scores[i] > best[0]):
            store(best, scores[i], 0)
            store(which, i * WARP + lane, 0)
    for distance in (16, 8, 4, 2, 1):
        other = let("other", shuffle_xor(best[0], distance))
        number = let("number", shuffle_xor(which[0], distance))
        is_better = T.Or(other > best[0], T.And(other == best[0], number < which[0]))
        with when(is_better):
            store(best, other, 0)
            store(which, number, 0)


ROUTE = Family(
    route,
    _ROUTE,
    writes="ids weights",
    cost=lambda p: elementwise(p["E"] + 2 * p["top_k"], p["E"] * (p["top_k"] + 2)),
    grid=lambda p: (per_row(), ONE, ONE),
)


# --- products -------------------------------------------------------------------------------------


def _product(E, N, K, top_k, dtype, is_gated, x_pairs, first_steps: Prologue) -> PrimFunc:  # type: ignore[no-untyped-def]
    """Make a product of each pair's row with its expert's matrix [N, K]; X has `x_pairs` rows a token."""
    epilogue = "swiglu" if is_gated else "none"
    blocks, words, parts = weight_blocks(N, epilogue), block_words(dtype, K), units(dtype, K)
    outputs, columns = (N // 2, HALF) if is_gated else (N, BLOCK)

    def body(w, x, ids, y, tokens, ld_x, norm=None) -> None:  # type: ignore[no-untyped-def]
        w = array(w, (E * blocks, words), weight_type(dtype))
        x = array(x, (tokens * x_pairs, ld_x), first_steps.row_type)
        ids = array(ids, (tokens * top_k,), "int32")
        y = array(y, (tokens * top_k, outputs), "float32")
        norm, _ = first_steps.arrays(norm, None, tokens, None)
        with threads((blocks, tokens * top_k, 1), (WARP, WARPS, 1)) as (block, pair, lane, warp):
            acc, sums = local("acc", (1,)), shared("sums", (WARPS, 1, BLOCK))
            line = let(
                "line", T.cast(ids[pair], "int64") * T.int64(blocks) + T.cast(block, "int64")
            )
            row = let("row", pair if x_pairs == top_k else pair // top_k)
            rows = x
            if first_steps.is_needed:
                rows = first_steps.stage(x, norm, None, lambda _: row, 1, 1, lane, warp)

            def read(_: int, word: Expr) -> Expr:
                return rows[0 if first_steps.is_needed else row, word]

            store(acc, T.float32(0), 0)
            with T.serial(ceil_div(parts, WARPS)) as i:
                unit = let("unit", i * WARPS + warp)
                with when(unit < parts):
                    multiply(K, dtype, first_steps.rows, Line(w, line), 0, lane, unit, read, acc, 1)
            store(sums, acc[0], warp, 0, lane)
            barrier()
            column = let("column", block * columns + lane)
            with when(warp == 0, lane < columns, column < outputs):
                value = let("value", total(sums, 0, lane))
                if is_gated:
                    value = silu(value) * total(sums, 0, lane + HALF)
                store(y, value, pair, column)

    types = {"w": weight_type(dtype), "x": first_steps.row_type, "ids": "int32"}
    types |= {"y": "float32", "norm": "float32"}
    return make_kernel(_product_arguments({"prologue": first_steps.kind}), types, body)


def _product_arguments(p: Parameters) -> str:
    norm, _ = prologue_arguments(p)
    return f"w x{norm} ids y tokens ld_x"


def expert_gate_up(E: int, I: int, H: int, top_k: int, dtype: str, **rows: Any) -> PrimFunc:  # noqa: E741
    """Make the kernel (W [E, 2 I, H] packed, X [T, H], [NORM f32 [H],] IDS i32 [T, k], Y f32 [T, k, I], T, ld_x); k is top_k.

    `rows`, `prologue`, `eps` and `offset` are those of `linear`.
    """
    return _product(E, 2 * I, H, top_k, dtype, True, 1, prologue_of(rows, H))


def expert_down(E: int, I: int, H: int, top_k: int, dtype: str, **rows: Any) -> PrimFunc:  # noqa: E741
    """Make the kernel (W [E, H, I] packed, X [T, k, I], IDS i32 [T, k], Y f32 [T, k, H], T, ld_x); k is top_k."""
    return _product(E, H, I, top_k, dtype, False, top_k, prologue_of(rows, I))


def _grid(N: int, epilogue: str, p: Parameters) -> Grid:
    return fixed(weight_blocks(N, epilogue)), per_row(p["top_k"]), ONE


def _cost(p: Parameters, N: int, K: int, outputs: int, x_rows: int) -> Cost:
    moved = x_rows * row_bytes(K, p["rows"]) + p["top_k"] * outputs * F32_BYTES
    return Cost(
        peak_of(p["rows"]),
        weight_share=p["top_k"] / p["E"],
        cached_bytes_per_token=moved,
        operations_per_token=2 * p["top_k"] * N * K,
    )


EXPERT_GATE_UP = Family(
    expert_gate_up,
    _product_arguments,
    writes="y",
    cost=lambda p: _cost(p, 2 * p["I"], p["H"], p["I"], 1),
    grid=lambda p: _grid(2 * p["I"], "swiglu", p),
)
EXPERT_DOWN = Family(
    expert_down,
    _product_arguments,
    writes="y",
    cost=lambda p: _cost(p, p["H"], p["I"], p["H"], p["top_k"]),
    grid=lambda p: _grid(p["H"], "none", p),
)
