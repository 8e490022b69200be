"""One token of the gated delta rule: decode, and runs too short for the chunk scan.

    S' = exp(g) S + k d^T      d = beta (v - exp(g) S^T k)      o = S'^T q = exp(g) S^T q + (q.k) d
    y  = o / sqrt(mean(o^2) + eps) * w * silu(z)

with q and k divided by their l2 norms, q times Dk^-0.5, beta = sigmoid(b), g = -exp(A_log) softplus(a + dt_bias).
The last form of o needs no third pass: pass 1 reads S once for S^T k and S^T q, pass 2 rewrites it. Both walk whole
rows, 4 at a time: a walk by columns would defeat the prefetcher. Bytes moved: the state of one head, read and
written; it stays in L2 between the passes. The limit is memory bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.x86 import Isa
from q35c.codegen.cpu.kernels.vectors import (
    STACK,
    Expr,
    hsum,
    let,
    ramp,
    splat,
    vector_type,
    vexp,
    vlog1p_unit,
    vrsqrt,
    vsigmoid,
    vsilu,
)
from q35c.layouts.blobs import SLOT_WORDS

L2_EPS = 1e-6  # inside the square root: x * rsqrt(sum(x^2) + eps), fixed by the model family
STEP_ROWS = 4  # rows of S per inner loop: 8 broadcasts of q and k stay in registers

Q_NORM, K_NORM, Q_DOT_K, DECAY_LOG, DECAY, BETA = range(6)  # the scalars of one step


@dataclass(frozen=True)
class DeltaShape:
    """Describe one gated delta layer: Hk key heads of Dk, Hv value heads of Dv."""

    Hk: int
    Hv: int
    Dk: int
    Dv: int
    eps: float
    slot_offset: int  # of this layer's state in a sequence's region, in f32 elements
    isa: Isa

    @property
    def lanes(self) -> int:
        """Return the vector width in f32 values."""
        return self.isa.lanes

    @property
    def channels(self) -> int:
        """Return the width of one qkv row."""
        return 2 * self.Hk * self.Dk + self.Hv * self.Dv

    @property
    def ratio(self) -> int:
        """Return how many value heads share a key head."""
        return self.Hv // self.Hk

    def q(self, head: Expr) -> Expr:
        """Return the first qkv column of the query that value head `head` uses."""
        return T.truncdiv(head, self.ratio) * self.Dk

    def k(self, head: Expr) -> Expr:
        """Return the first qkv column of the key that value head `head` uses."""
        return self.Hk * self.Dk + self.q(head)

    def v(self, head: Expr) -> Expr:
        """Return the first qkv column of value head `head`."""
        return 2 * self.Hk * self.Dk + head * self.Dv

    def state(self, slot: Expr, head: Expr) -> Expr:
        """Return where a head's state [Dk, Dv] begins; slots count units of 64 bytes."""
        return slot * SLOT_WORDS + self.slot_offset + head * (self.Dk * self.Dv)

    def state_rows(self, state: Expr, base: Expr, group: Expr, j: Expr) -> list[Expr]:
        """Return vector j of each of the STEP_ROWS state rows of a group."""
        first = base + group * (STEP_ROWS * self.Dv) + j * self.lanes
        return [state[ramp(first + r * self.Dv, self.lanes)] for r in range(STEP_ROWS)]

    def row_factors(self, qkv: Expr, row: Expr, column: Expr, group: Expr) -> list[Expr]:
        """Return the broadcast q or k values that belong to the state rows of a group."""
        first = column + group * STEP_ROWS
        return [splat(qkv[row, first + r], self.lanes) for r in range(STEP_ROWS)]


def decay_log(a: Expr, dt_bias: Expr, a_log: Expr, lanes: int) -> Expr:
    """Return g = -exp(A_log) * softplus(a + dt_bias), all f32."""
    zero = splat(0.0, lanes)

    def softplus(x: Expr) -> Expr:  # max(x, 0) + log1p(exp(-|x|))
        power = vexp(zero - T.max(zero - x, x), lanes)
        return T.max(zero, x) + let(power, lambda power: vlog1p_unit(power, lanes))

    return zero - vexp(a_log, lanes) * let(a + dt_bias, softplus)


@T.inline
def gated_norm(shape, o, z, norm_w, y, row, head):
    """Y[row, head] = norm(o) * w * silu(z); o(j) is vector j of the output and may be Y itself."""
    square = T.alloc_buffer((shape.lanes,), "float32")
    square[ramp(0, shape.lanes)] = splat(0.0, shape.lanes)
    for j in T.unroll(shape.Dv // shape.lanes):
        square[ramp(0, shape.lanes)] = square[ramp(0, shape.lanes)] + o(j) * o(j)
    total: T.let[T.float32] = hsum(square[ramp(0, shape.lanes)], shape.lanes)
    scale: T.let[T.float32] = vrsqrt(total * T.float32(1 / shape.Dv) + T.float32(shape.eps), 1)
    for j in T.serial(shape.Dv // shape.lanes):
        y[row, ramp(head * shape.Dv + j * shape.lanes, shape.lanes)] = (
            o(j)
            * splat(scale, shape.lanes)
            * norm_w[ramp(j * shape.lanes, shape.lanes)]
            * vsilu(z[row, ramp(head * shape.Dv + j * shape.lanes, shape.lanes)], shape.lanes)
        )


@T.inline
def dot_products(shape, qkv, row, head, dots):
    """Leave |q|^2, |k|^2 and q.k in dots[0:3], as partial sums over lanes."""
    for i in T.unroll(3):
        dots[i, ramp(0, shape.lanes)] = splat(0.0, shape.lanes)
    for d in T.unroll(shape.Dk // shape.lanes):
        q: T.let[vector_type("float32", shape.lanes)] = qkv[
            row, ramp(shape.q(head) + d * shape.lanes, shape.lanes)
        ]
        k: T.let[vector_type("float32", shape.lanes)] = qkv[
            row, ramp(shape.k(head) + d * shape.lanes, shape.lanes)
        ]
        dots[0, ramp(0, shape.lanes)] = dots[0, ramp(0, shape.lanes)] + q * q
        dots[1, ramp(0, shape.lanes)] = dots[1, ramp(0, shape.lanes)] + k * k
        dots[2, ramp(0, shape.lanes)] = dots[2, ramp(0, shape.lanes)] + q * k


def vector_of(buffer: Expr, lanes: int) -> Callable[[Expr], Expr]:
    """Return the function from j to vector j of a buffer."""
    return lambda j: buffer[ramp(j * lanes, lanes)]


def vector_of_row(buffer: Expr, row: Expr, column: Expr, lanes: int) -> Callable[[Expr], Expr]:
    """Return the function from j to vector j of a row, counted from `column`."""
    return lambda j: buffer[row, ramp(column + j * lanes, lanes)]


def add_rows(total: Expr, rows: list[Expr], factors: list[Expr]) -> Expr:
    """Return total + the sum of row * factor, left to right."""
    for row, factor in zip(rows, factors, strict=True):
        total = total + row * factor
    return total


@T.inline
def project_state(shape, qkv, row, head, state, base, k_sum, q_sum):
    """k_sum = S^T k, q_sum = S^T q with k and q as they came: one pass over the head's state."""
    for j in T.serial(shape.Dv // shape.lanes):
        k_sum[ramp(j * shape.lanes, shape.lanes)] = splat(0.0, shape.lanes)
        q_sum[ramp(j * shape.lanes, shape.lanes)] = splat(0.0, shape.lanes)
    for d in T.serial(shape.Dk // STEP_ROWS):
        for j in T.serial(shape.Dv // shape.lanes):
            k_sum[ramp(j * shape.lanes, shape.lanes)] = add_rows(
                k_sum[ramp(j * shape.lanes, shape.lanes)],
                shape.state_rows(state, base, d, j),
                shape.row_factors(qkv, row, shape.k(head), d),
            )
            q_sum[ramp(j * shape.lanes, shape.lanes)] = add_rows(
                q_sum[ramp(j * shape.lanes, shape.lanes)],
                shape.state_rows(state, base, d, j),
                shape.row_factors(qkv, row, shape.q(head), d),
            )


@T.inline
def update_state(shape, qkv, row, head, state, base, decay, change):
    """S = decay S + k change^T, k as it came: the second pass, from L2."""
    for d in T.serial(shape.Dk // STEP_ROWS):
        for j in T.serial(shape.Dv // shape.lanes):
            for r in T.unroll(STEP_ROWS):
                at: T.let[T.int64] = base + (d * STEP_ROWS + r) * shape.Dv + j * shape.lanes
                state[ramp(at, shape.lanes)] = state[ramp(at, shape.lanes)] * splat(
                    decay, shape.lanes
                ) + change[ramp(j * shape.lanes, shape.lanes)] * splat(
                    qkv[row, shape.k(head) + d * STEP_ROWS + r], shape.lanes
                )


@T.inline
def step_scalars(shape, qkv, b, a, a_log, dt_bias, row, head, factors):
    """factors = rsqrt of |q|^2 times Dk^-0.5, rsqrt of |k|^2, q.k normalised, g, exp(g), beta.

    They pass through memory, not `let`: TVM substitutes a bound expression at each use, and nested exps explode.
    """
    dots = T.alloc_buffer((3, shape.lanes), "float32")
    dot_products(shape, qkv, row, head, dots)
    for i in T.unroll(3):
        factors[i] = hsum(dots[i, ramp(0, shape.lanes)], shape.lanes)
    factors[Q_NORM] = T.float32(shape.Dk**-0.5) * vrsqrt(factors[Q_NORM] + T.float32(L2_EPS), 1)
    factors[K_NORM] = vrsqrt(factors[K_NORM] + T.float32(L2_EPS), 1)
    factors[Q_DOT_K] = factors[Q_DOT_K] * factors[Q_NORM] * factors[K_NORM]
    factors[DECAY_LOG] = decay_log(a[row, head], dt_bias[head], a_log[head], 1)
    factors[DECAY] = vexp(factors[DECAY_LOG], 1)
    factors[BETA] = vsigmoid(b[row, head], 1)


@T.inline
def recurrent_step(shape, qkv, z, b, a, a_log, dt_bias, norm_w, state, base, y, row, head):
    """Advance one head's state, which begins at `base`, by row `row`; write that head's output."""
    k_sum = T.alloc_buffer((shape.Dv,), "float32", annotations=STACK)  # S^T k, then the change d
    q_sum = T.alloc_buffer((shape.Dv,), "float32", annotations=STACK)  # S^T q, then the output o
    factors = T.alloc_buffer((6,), "float32")
    step_scalars(shape, qkv, b, a, a_log, dt_bias, row, head, factors)
    project_state(shape, qkv, row, head, state, base, k_sum, q_sum)
    for j in T.serial(shape.Dv // shape.lanes):
        change: T.let[vector_type("float32", shape.lanes)] = (
            qkv[row, ramp(shape.v(head) + j * shape.lanes, shape.lanes)]
            - k_sum[ramp(j * shape.lanes, shape.lanes)]
            * splat(factors[K_NORM] * factors[DECAY], shape.lanes)
        ) * splat(factors[BETA], shape.lanes)
        q_sum[ramp(j * shape.lanes, shape.lanes)] = q_sum[
            ramp(j * shape.lanes, shape.lanes)
        ] * splat(factors[Q_NORM] * factors[DECAY], shape.lanes) + change * splat(
            factors[Q_DOT_K], shape.lanes
        )
        k_sum[ramp(j * shape.lanes, shape.lanes)] = change * splat(factors[K_NORM], shape.lanes)
    update_state(shape, qkv, row, head, state, base, factors[DECAY], k_sum)
    gated_norm(shape, vector_of(q_sum, shape.lanes), z, norm_w, y, row, head)
