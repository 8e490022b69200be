"""What is done to rows element by element, or group by group: look-up, rounding, and the sum of experts' outputs.

A row stays in the L2 cache: the limit is the launch.
"""

from __future__ import annotations

from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost
from q35c.codegen.cuda.kernels.blocks import (
    Line,
    block_words,
    level_word,
    weight_scale,
    weight_type,
)
from q35c.codegen.cuda.kernels.family import (
    F32_BYTES,
    ONE,
    WARP,
    Family,
    Parameters,
    ceil_div,
    elementwise,
    fixed,
    per_row,
    row_bytes,
    weight_bytes,
)
from q35c.codegen.cuda.kernels.make import Expr, T, add, array, let, local, make_kernel, store
from q35c.codegen.cuda.kernels.rounding import VALUES, distances, round_values
from q35c.codegen.cuda.kernels.threads import (
    columns,
    extern,
    high_bf16,
    low_bf16,
    shuffle_xor,
    sigmoid,
    threads,
    when,
)
from q35c.formats.integer import IntegerFormat
from q35c.formats.registry import integer_format
from q35c.layouts.rows import SUM_FACTOR, IntegerRow
from q35c.layouts.weights import BLOCK

WARPS = 8
THREADS = WARPS * WARP
_ROUND = (
    12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the mantissa
)
_ROUND_BITS = 0x4B400000
_MAGNITUDE = 0x7FFFFFFF


# --- embedding ------------------------------------------------------------------------------------

_EMBEDDING = "w ids y tokens ld_y"


def embedding(V: int, H: int, dtype: str) -> PrimFunc:
    """Make the kernel (W [V, H] packed, IDS i32 [T], Y f32 [T, H], T, ld_y): Y[t] = W[IDS[t]]."""
    words = block_words(dtype, H)

    def body(w, ids, y, tokens, ld_y) -> None:  # type: ignore[no-untyped-def]
        w = array(w, (ceil_div(V, BLOCK), words), weight_type(dtype))
        ids, y = array(ids, (tokens,), "int32"), array(y, (tokens, ld_y), "float32")
        with threads((tokens, 1, 1), (THREADS, 1, 1)) as (row, t):
            token = let("token", ids[row])
            block, lane = let("block", token // BLOCK), let("lane", token % BLOCK)
            with columns(H, t, THREADS) as d:
                store(y, _element(H, dtype, Line(w, block), lane, d), row, d)

    types = {"w": weight_type(dtype), "ids": "int32", "y": "float32"}
    return make_kernel(_EMBEDDING, types, body)


def _element(H: int, dtype: str, line: Line, lane: Expr, d: Expr) -> Expr:
    """Return one value of a block's row as f32."""
    form = integer_format(dtype)
    if form is not None:
        return _integer(H, form, line, lane, d)
    if dtype == "f32":
        return line[d * BLOCK + lane]
    word = let("word", line[(d >> 1) * BLOCK + lane])
    return T.Select((d & 1) == 0, low_bf16(word), high_bf16(word))


def _integer(H: int, form: IntegerFormat, line: Line, lane: Expr, d: Expr) -> Expr:
    group, inside = let("group", d // form.group), let("inside", d % form.group)
    number, position = inside // form.set_inputs, let("position", inside % form.set_inputs)
    level = local("level", (1,), "int32")
    for word in range(form.set_inputs // 4):
        with when(position // 4 == word):
            levels = level_word(form, H, line, 0, lane, group, number, word)
            shifted = T.shift_left(levels, 24 - position % 4 * 8)
            store(level, T.shift_right(shifted, 24), 0)
    return T.cast(level[0], "float32") * weight_scale(form, H, line, 0, lane, group)


def _embedding_cost(p: Parameters) -> Cost:
    return Cost(
        bytes_per_token=weight_bytes(1, p["H"], p["dtype"]),
        cached_bytes_per_token=p["H"] * F32_BYTES,
    )


EMBEDDING = Family(
    embedding, _EMBEDDING, writes="y", cost=_embedding_cost, grid=lambda p: (per_row(), ONE, ONE)
)


# --- rounding -------------------------------------------------------------------------------------

_QUANTIZE = "x q tokens ld_x ld_q"


def quantize_rows(K: int, group: int, pairs: int = 1) -> PrimFunc:
    """Make the kernel (X f32 [T * pairs, K], Q i32 in rows of `IntegerRow`, T, ld_x, ld_q).

        scale = max |x| / 127      q = nearest(x / scale)      sum = SUM_FACTOR * sum of q

    A lane has a word of codes.
    """
    layout = IntegerRow(K, group, has_starts=False)
    lanes = group // VALUES

    def body(x, q, tokens, ld_x, ld_q) -> None:  # type: ignore[no-untyped-def]
        x = array(x, (tokens * pairs, ld_x), "float32")
        q = array(q, (tokens * pairs, ld_q), "int32")
        grid = (ceil_div(layout.scales, THREADS), tokens * pairs, 1)
        with threads(grid, (THREADS, 1, 1)) as (bx, row, t):
            word = let("word", bx * THREADS + t)
            values = local("values", (VALUES,))
            for j in range(VALUES):
                k = let("k", word * VALUES + j)
                store(values, T.float32(0), j)
                with when(k < K):
                    store(values, x[row, k], j)
            made = round_values(values, group)
            total = made.total
            for distance in distances(group):
                store(total, total[0] + shuffle_xor(total[0], distance), 0)
            with when(word < layout.scales):
                store(q, made.word[0], row, word)
            with when(word < layout.scales, t % lanes == 0):
                number = let("number", word // lanes)
                store(q, made.scale, row, layout.scales + number)
                store(q, total[0] * SUM_FACTOR, row, layout.sums + number)

    return make_kernel(_QUANTIZE, {"x": "float32", "q": "int32"}, body)


def _rounding_cost(p: Parameters) -> Cost:
    dtype = f"q8g{p['group']}" if "group" in p else "bf16"
    values = p["K"] * p["pairs"]
    cached = p["pairs"] * (p["K"] * F32_BYTES + row_bytes(p["K"], dtype))
    return Cost(cached_bytes_per_token=cached, operations_per_token=5 * values)


def _word_blocks(p: Parameters) -> int:
    return ceil_div(IntegerRow(p["K"], p["group"], has_starts=False).scales, THREADS)


QUANTIZE_ROWS = Family(
    quantize_rows,
    _QUANTIZE,
    writes="q",
    cost=_rounding_cost,
    grid=lambda p: (fixed(_word_blocks(p)), per_row(p["pairs"]), ONE),
)

_ROUND_ROWS = "x y tokens ld_x ld_y"


def round_rows(K: int, pairs: int = 1) -> PrimFunc:
    """Make the kernel (X f32 [T * pairs, K], Y u32 [T * pairs, ceil(K / 2)], T, ld_x, ld_y): two bf16 in a word."""
    words = ceil_div(K, 2)

    def body(x, y, tokens, ld_x, ld_y) -> None:  # type: ignore[no-untyped-def]
        x = array(x, (tokens * pairs, ld_x), "float32")
        y = array(y, (tokens * pairs, ld_y), "uint32")
        with (
            threads((tokens * pairs, 1, 1), (THREADS, 1, 1)) as (row, t),
            columns(words, t, THREADS) as d,
        ):
            low = let("low", extern("uint32", "q35c_bf16", x[row, d * 2]))
            second = x[row, d * 2 + 1]
            if K % 2:
                second = T.if_then_else(d * 2 + 1 < K, second, T.float32(0))
            high = T.shift_left(extern("uint32", "q35c_bf16", second), T.uint32(16))
            store(y, T.bitwise_or(low, high), row, d)

    return make_kernel(_ROUND_ROWS, {"x": "float32", "y": "uint32"}, body)


ROUND_ROWS = Family(
    round_rows,
    _ROUND_ROWS,
    writes="y",
    cost=_rounding_cost,
    grid=lambda p: (per_row(p["pairs"]), ONE, ONE),
)


# --- the sum of experts ---------------------------------------------------------------------------

_COMBINE = "y2 weights shared gate residual y tokens ld_shared ld_gate ld_residual ld_y"


def combine(H: int, top_k: int, has_shared: bool) -> PrimFunc:
    """Make the kernel (Y2 f32 [T, k, H], WEIGHTS [T, k], SHARED [T, H], GATE [T, 1], RESIDUAL, Y [T, H], T, ld_..).

    Y = RESIDUAL + sum_j WEIGHTS[j] Y2[j], and with `has_shared` + sigmoid(GATE) SHARED.
    """

    def body(y2, weights, shared, gate, residual, y, tokens, ld_shared, ld_gate, ld_residual, ld_y) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
        y2 = array(y2, (tokens, top_k, H), "float32")
        weights = array(weights, (tokens, top_k), "float32")
        shared, gate = (
            array(shared, (tokens, ld_shared), "float32"),
            array(gate, (tokens, ld_gate), "float32"),
        )
        residual, y = (
            array(residual, (tokens, ld_residual), "float32"),
            array(y, (tokens, ld_y), "float32"),
        )
        with threads((tokens, 1, 1), (THREADS, 1, 1)) as (row, t), columns(H, t, THREADS) as d:
            total = local("total", (1,))
            store(total, residual[row, d], 0)
            for choice in range(top_k):
                add(total, weights[row, choice] * y2[row, choice, d], 0)
            if has_shared:
                add(total, sigmoid(gate[row, 0]) * shared[row, d], 0)
            store(y, total[0], row, d)

    names = ("y2", "weights", "shared", "gate", "residual", "y")
    return make_kernel(_COMBINE, dict.fromkeys(names, "float32"), body)


COMBINE = Family(
    combine,
    _COMBINE,
    writes="y",
    cost=lambda p: elementwise(p["H"] * (p["top_k"] + 3), 2 * p["H"] * (p["top_k"] + 1)),
    grid=lambda p: (per_row(), ONE, ONE),
)
