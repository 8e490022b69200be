"""The gated delta net: convolution, gates and norms of keys; the recurrence; the gated norm of its outputs.

    S <- exp(g) S;  S <- S + k (beta (v - k S));  o = q S;        y = o * rsqrt(mean(o^2) + eps) * w * silu(z)

`delta_inputs` makes q, k, v and the gates of each row; `delta_scan` runs the recurrence of each head token by token, 32
columns of the state in a block, each thread with some of a column's rows in registers; `delta_output` is the norm. Limits:
the bandwidth of the state for one token, and the latency of a step for many.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost
from q35c.codegen.cuda.kernels.cache import HUGE
from q35c.codegen.cuda.kernels.family import (
    EXP_OPERATIONS,
    F32_BYTES,
    ONE,
    WARP,
    Family,
    Grid,
    Parameters,
    ceil_div,
    elementwise,
    fixed,
    per_row,
)
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
from q35c.codegen.cuda.kernels.threads import (
    barrier,
    block_sum,
    columns,
    sigmoid,
    silu,
    threads,
    warp_sum,
    when,
)
from q35c.layouts.blobs import SLOT_WORDS

SLICES = 8  # parts of a column's rows, one a warp
L2_EPS = 1e-6


@dataclass(frozen=True)
class Heads:
    """The shape of a gated delta net."""

    Hk: int
    Hv: int
    Dk: int
    Dv: int

    @property
    def channels(self) -> int:
        """Return the columns of q, k and v side by side."""
        return 2 * self.Hk * self.Dk + self.Hv * self.Dv


def heads_of(p: Parameters) -> Heads:
    return Heads(p["Hk"], p["Hv"], p["Dk"], p["Dv"])


# --- convolution, norms, gates --------------------------------------------------------------------

_INPUTS = "conv_w conv_state qkv b a a_log dt_bias slots mixed gates tokens ld_qkv ld_b ld_a ld_mixed ld_gates"


def delta_inputs(Hk: int, Hv: int, Dk: int, Dv: int, K: int, rows: str) -> PrimFunc:
    """Make the kernel (CONV_W f32 [K, C], CONV_STATE [K - 1, C] in the state, QKV [T, C], B, A [T, Hv], A_LOG, DT_BIAS [Hv],
    SLOTS i64 [B], MIXED f32 [T, C], GATES [T, Hv, 2], T, ld_..).

    MIXED gets SiLU of the convolution, q and k divided by their lengths and q by sqrt(Dk), too; GATES exp(g) and beta.
    A block has a head of a row.
    """
    heads = Heads(Hk, Hv, Dk, Dv)
    width = ceil_div(max(Dk, Dv), WARP) * WARP

    def body(  # type: ignore[no-untyped-def]
        conv_w, conv_state, qkv, b, a, a_log, dt_bias, slots, mixed, gates, tokens, ld_qkv, ld_b, ld_a, ld_mixed, ld_gates
    ) -> None:  # fmt: skip
        conv_w = array(conv_w, (K, heads.channels), "float32")
        conv_state = array(conv_state, (HUGE,), "float32")
        slots = array(slots, (tokens,), "int64")
        qkv, b, a = (
            array(x, (tokens, ld), "float32") for x, ld in ((qkv, ld_qkv), (b, ld_b), (a, ld_a))
        )
        a_log, dt_bias = array(a_log, (Hv,), "float32"), array(dt_bias, (Hv,), "float32")
        mixed, gates = (
            array(mixed, (tokens, ld_mixed), "float32"),
            array(gates, (tokens, ld_gates), "float32"),
        )
        with threads((2 * Hk + Hv, tokens, 1), (width, 1, 1)) as (head, row, t):
            base = let("base", slots[row if rows == "batch" else 0] * T.int64(SLOT_WORDS))
            value, squares, parts = (
                local("value", (1,)),
                local("squares", (1,)),
                shared("parts", (width // WARP,)),
            )
            dims = let("dims", T.Select(head < 2 * Hk, Dk, Dv))
            first = let(
                "first", T.Select(head < 2 * Hk, head * Dk, 2 * Hk * Dk + (head - 2 * Hk) * Dv)
            )
            store(value, T.float32(0), 0)
            with when(t < dims):
                column = let("column", first + t)
                for tap in range(K):
                    earlier = tap - (K - 1) + (0 if rows == "batch" else row)
                    kept = conv_state[
                        base + T.cast((K - 1 + earlier) * heads.channels + column, "int64")
                    ]
                    if rows == "batch":
                        x = qkv[row, column] if tap == K - 1 else kept
                    else:
                        x = T.if_then_else(earlier < 0, kept, qkv[T.max(earlier, 0), column])
                    add(value, conv_w[tap, column] * x, 0)
                store(value, silu(value[0]), 0)
            with when(head < 2 * Hk):
                store(squares, value[0] * value[0], 0)
                block_sum(squares, parts, t, width // WARP)
                length = let("length", T.sqrt(squares[0] + T.float32(L2_EPS)))
                factor = T.Select(head < Hk, T.float32(Dk**-0.5), T.float32(1))
                store(value, value[0] / length * factor, 0)
            with when(t < dims):
                store(mixed, value[0], row, first + t)
            with when(head >= 2 * Hk, t == 0):
                number = let("number", head - 2 * Hk)
                x = let("x", a[row, number] + dt_bias[number])
                softplus = T.max(x, T.float32(0)) + T.log1p(T.exp(-T.abs(x)))
                store(gates, T.exp(-T.exp(a_log[number]) * softplus), row, number * 2)
                store(gates, sigmoid(b[row, number]), row, number * 2 + 1)

    names = _INPUTS.split()[:10]
    types = dict.fromkeys(names, "float32") | {"slots": "int64"}
    return make_kernel(_INPUTS, types, body)


def _inputs_cost(p: Parameters) -> Cost:
    heads = heads_of(p)
    words = 2 * heads.channels + 4 * p["Hv"]
    operations = heads.channels * (2 * p["K"] + EXP_OPERATIONS + 4) + 4 * EXP_OPERATIONS * p["Hv"]
    return Cost(
        bytes_per_sequence=(p["K"] - 1) * heads.channels * F32_BYTES,
        cached_bytes_per_token=words * F32_BYTES,
        operations_per_token=operations,
    )


DELTA_INPUTS = Family(
    delta_inputs,
    _INPUTS,
    writes="mixed gates",
    cost=_inputs_cost,
    grid=lambda p: (fixed(2 * p["Hk"] + p["Hv"]), per_row(), ONE),
)


# --- the recurrence -------------------------------------------------------------------------------

_SCAN = "conv_state state qkv mixed gates slots o tokens ld_qkv ld_mixed ld_gates ld_o"


def delta_scan(Hk: int, Hv: int, Dk: int, Dv: int, K: int, rows: str) -> PrimFunc:
    """Make the kernel (CONV_STATE f32 [K - 1, C], STATE [Hv, Dk, Dv] in the state, QKV [T, C], MIXED, GATES, SLOTS, O f32
    [T, Hv, Dv], T, ld_..).

    CONV_STATE becomes the last rows of QKV, for which it stands. With `rows` batch, row b is one token of sequence b.
    """
    heads, share = Heads(Hk, Hv, Dk, Dv), ceil_div(Dk, SLICES)
    tiles = ceil_div(Dv, WARP)
    blocks = Hv * tiles

    def body(conv_state, state, qkv, mixed, gates, slots, o, tokens, ld_qkv, ld_mixed, ld_gates, ld_o) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
        conv_state, state = array(conv_state, (HUGE,), "float32"), array(state, (HUGE,), "float32")
        qkv, mixed = (
            array(qkv, (tokens, ld_qkv), "float32"),
            array(mixed, (tokens, ld_mixed), "float32"),
        )
        gates, o = array(gates, (tokens, ld_gates), "float32"), array(o, (tokens, ld_o), "float32")
        slots = array(slots, (tokens,), "int64")
        sequences = tokens if rows == "batch" else 1
        grid = (Hv, tiles, sequences)
        with threads(grid, (WARP, SLICES, 1)) as bound:
            head, *others, lane, slice_ = bound
            tile = others[0] if tiles > 1 else 0
            sequence = others[-1] if rows == "batch" else 0
            cells = local("cells", (share,))
            # Two, as each is read until the barrier behind the next write of the other.
            sums = shared("seen", (SLICES, WARP)), shared("sums", (SLICES, WARP))
            column = let("column", tile * WARP + lane)
            base = let("base", slots[sequence] * T.int64(SLOT_WORDS))
            dims = [slice_ * share + i for i in range(share)]

            def cell(k: Expr) -> Expr:
                return base + T.cast((head * Dk + k) * Dv + column, "int64")

            def mine(k: Expr) -> tuple[Expr, ...]:
                conditions = (k < Dk,) if Dk % SLICES else ()
                return (*conditions, column < Dv) if Dv % WARP else conditions

            for i, k in enumerate(dims):
                store(cells, T.float32(0), i)
                with when(*mine(k), True):
                    store(cells, state[cell(k)], i)
            with T.serial(1 if rows == "batch" else tokens) as step:
                row = sequence if rows == "batch" else step
                _step(heads, cells, sums, mixed, gates, o, row, head, column, lane, slice_, share)
            for i, k in enumerate(dims):
                with when(*mine(k), True):
                    store(state, cells[i], cell(k))
            number = let("number", head * tiles + tile)
            thread = let("thread", number * (WARP * SLICES) + slice_ * WARP + lane)
            with columns(heads.channels, thread, blocks * WARP * SLICES) as d:
                for j in range(K - 1):
                    at = base + T.cast(j * heads.channels + d, "int64")
                    if rows == "batch":
                        after = base + T.cast((j + 1) * heads.channels + d, "int64")
                        value = qkv[sequence, d] if j == K - 2 else conv_state[after]
                    else:
                        earlier = tokens - (K - 1) + j
                        after = base + T.cast((K - 1 + earlier) * heads.channels + d, "int64")
                        value = T.if_then_else(
                            earlier < 0, conv_state[after], qkv[T.max(earlier, 0), d]
                        )
                    store(conv_state, value, at)

    types = dict.fromkeys(_SCAN.split()[:7], "float32") | {"slots": "int64"}
    return make_kernel(_SCAN, types, body)


def _step(heads, cells, sums, mixed, gates, o, row, head, column, lane, slice_, share) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
    """Emit one token of the recurrence: what threads of a column share goes through `sums`."""
    key_head = let("key_head", head // (heads.Hv // heads.Hk))
    first = let("first", slice_ * share)
    is_ragged = heads.Dk % SLICES != 0
    value, delta = local("v", (1,)), local("delta", (1,))
    decay = let("decay", gates[row, head * 2])
    beta = let("beta", gates[row, head * 2 + 1])

    def part(of: int, i: int) -> Expr:
        """Return dim i of this thread's part of q (0) or k (1)."""
        at = (of * heads.Hk + key_head) * heads.Dk
        if not is_ragged:
            return mixed[row, at + first + i]
        inside = first + i < heads.Dk
        return T.Select(inside, mixed[row, at + T.min(first + i, heads.Dk - 1)], T.float32(0))

    def total(of: int) -> Expr:
        result = sums[of][0, lane]
        for other in range(1, SLICES):
            result = result + sums[of][other, lane]
        return result

    store(value, T.float32(0), 0)
    for i in range(share):
        store(cells, cells[i] * decay, i)
        add(value, part(1, i) * cells[i], 0)
    store(sums[0], value[0], slice_, lane)
    barrier()
    at = 2 * heads.Hk * heads.Dk + head * heads.Dv
    v = mixed[row, at + T.min(column, heads.Dv - 1)]
    store(delta, (v - total(0)) * beta, 0)
    store(value, T.float32(0), 0)
    for i in range(share):
        add(cells, part(1, i) * delta[0], i)
        add(value, part(0, i) * cells[i], 0)
    store(sums[1], value[0], slice_, lane)
    barrier()
    with when(slice_ == 0, column < heads.Dv):
        store(o, total(1), row, head * heads.Dv + column)


def _scan_cost(p: Parameters) -> Cost:
    heads = heads_of(p)
    state = p["Hv"] * p["Dk"] * p["Dv"]
    words = 2 * (state + (p["K"] - 1) * heads.channels)
    return Cost(
        bytes_per_sequence=words * F32_BYTES,
        cached_bytes_per_token=(2 * heads.channels + p["Hv"] * (p["Dv"] + 2)) * F32_BYTES,
        operations_per_token=7 * state,
    )


def _scan_grid(p: Parameters) -> Grid:
    sequences = per_row() if p["rows"] == "batch" else ONE
    return fixed(p["Hv"]), fixed(ceil_div(p["Dv"], WARP)), sequences


DELTA_SCAN = Family(
    delta_scan, _SCAN, writes="conv_state state o", cost=_scan_cost, grid=_scan_grid
)


# --- the gated norm -------------------------------------------------------------------------------

_OUTPUT = "o z norm_w y tokens ld_o ld_z ld_y"
WARPS = 4


def delta_output(Hv: int, Dv: int, eps: float) -> PrimFunc:
    """Make the kernel (O f32 [T, Hv, Dv], Z [T, Hv, Dv], NORM_W [Dv], Y [T, Hv, Dv], T, ld_..); a warp has a head of a row."""

    def body(o, z, norm_w, y, tokens, ld_o, ld_z, ld_y) -> None:  # type: ignore[no-untyped-def]
        o, z, y = (array(x, (tokens, ld), "float32") for x, ld in ((o, ld_o), (z, ld_z), (y, ld_y)))
        norm_w = array(norm_w, (Dv,), "float32")
        grid = (ceil_div(Hv, WARPS), tokens, 1)
        with threads(grid, (WARP, WARPS, 1)) as (bx, row, lane, warp):
            head = let("head", bx * WARPS + warp)
            total = local("total", (1,))
            with when(head < Hv):
                store(total, T.float32(0), 0)
                with columns(Dv, lane, WARP) as d:
                    add(total, o[row, head * Dv + d] * o[row, head * Dv + d], 0)
                warp_sum(total)
                mean = total[0] * T.float32(1.0 / Dv)
                factor = let("factor", T.rsqrt(mean + T.float32(eps)))
                with columns(Dv, lane, WARP) as d:
                    at = let("at", head * Dv + d)
                    store(y, o[row, at] * factor * norm_w[d] * silu(z[row, at]), row, at)

    return make_kernel(_OUTPUT, dict.fromkeys(("o", "z", "norm_w", "y"), "float32"), body)


DELTA_OUTPUT = Family(
    delta_output,
    _OUTPUT,
    writes="y",
    cost=lambda p: elementwise(3 * p["Hv"] * p["Dv"], (6 + EXP_OPERATIONS) * p["Hv"] * p["Dv"]),
    grid=lambda p: (fixed(ceil_div(p["Hv"], WARPS)), per_row(), ONE),
)
