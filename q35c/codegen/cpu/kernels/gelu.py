"""GELU of vectors: x times the normal distribution at x, exactly or as by GPT-2's tanh.

tanh    x / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)        as (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))
erf     x P(x);  P(-|x|) = exp(-x^2 / 2) q(t),  t = 1 / (1 + 0.4 |x| / sqrt(2));  P(|x|) = 1 - P(-|x|)
"""

from __future__ import annotations

import math

from tvm.script import tirx as T

from q35c.codegen.cpu.kernels.vectors import Expr, horner, let, splat, vexp

_SLOPE = 0.4 / math.sqrt(2)
# q, highest power first: half of erfc(a) exp(a^2), minimax for |x| up to 13, relative error 2.6e-8.
_TAIL = (
    0.013093028217554092, -0.030645374208688736, -0.04745708033442497, 0.158429354429245, -0.051120173186063766,
    0.1432262659072876, 0.08567272126674652, 0.11631912738084793, 0.11246505379676819, 1.708073068584781e-05,
)  # fmt: skip


def vgelu(x: Expr, lanes: int, form: str) -> Expr:
    """Return the GELU of this form, "tanh" or "erf", to 4e-7."""
    return let(x, lambda x: (_by_tanh if form == "tanh" else _by_erf)(x, lanes))


def _by_tanh(x: Expr, lanes: int) -> Expr:
    factor = -2 * math.sqrt(2 / math.pi)
    exponent = x * (splat(factor, lanes) + x * x * splat(factor * 0.044715, lanes))
    return x / (splat(1.0, lanes) + vexp(exponent, lanes))


def _by_erf(x: Expr, lanes: int) -> Expr:
    zero, one = splat(0.0, lanes), splat(1.0, lanes)

    def of_tail(below: Expr) -> Expr:
        return x * T.Select(x > zero, one - below, below)

    def of_magnitude(magnitude: Expr) -> Expr:
        t = one / (one + magnitude * splat(_SLOPE, lanes))
        power = vexp(x * x * splat(-0.5, lanes), lanes)
        return let(let(t, lambda t: horner(t, _TAIL, lanes)) * power, of_tail)

    return let(T.Select(x > zero, x, zero - x), of_magnitude)
