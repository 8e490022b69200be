"""The cosines and sines of a step's positions, once for all attention layers.

    table[t, i] = cos(position * inv_freq[i]) * scaling,   table[t, R/2 + i] = sin(..) * scaling

The angle is rounded to f32, as in eager PyTorch; its sine is then exact to f32 for any position: it is reduced and
evaluated in f64, since an angle may be as large as the context is long. Threads split the tokens.
"""

from __future__ import annotations

import math

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.kernels.common import Expr, let, share

# Taylor coefficients of sin(r)/r and cos(r) in r^2, highest first; 1e-14 on |r| <= pi/4.
_SIN = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(7, -1, -1))
_COS = tuple((-1) ** n / math.factorial(2 * n) for n in range(8, -1, -1))


def axis_of(index: int, sections: tuple[int, ...]) -> int:
    """Return which of the three position axes owns an angle: every third one of its section."""
    axis = index % 3
    return axis if axis and index < 3 * sections[axis] else 0


def choose(values: tuple[float, ...], index: Expr, make) -> Expr:
    """Return values[index]; after unrolling it folds to the constant."""
    if len(values) == 1:
        return make(values[0])
    half = len(values) // 2
    return T.Select(index < half, choose(values[:half], index, make), choose(values[half:], index - half, make))


def polynomial(square: Expr, coefficients: tuple[float, ...]) -> Expr:
    result = T.float64(coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * square + T.float64(coefficient)
    return result


def turned(angle: Expr, quarter_turns: int) -> Expr:
    """Return sin(angle + quarter_turns * pi/2) of an f64 angle."""

    def of_quadrant(k: Expr) -> Expr:
        quadrant = (T.cast(k, "int32") + quarter_turns) & 3
        remainder = angle - k * T.float64(math.pi / 2) - k * T.float64(6.123233995736766e-17)

        def value(r: Expr) -> Expr:
            sine, cosine = r * polynomial(r * r, _SIN), polynomial(r * r, _COS)
            odd = T.Select((quadrant & 1) == 1, cosine, sine)
            return T.Select(quadrant >= 2, T.float64(0) - odd, odd)

        return let(remainder, value)

    return let(T.floor(angle * T.float64(2 / math.pi) + T.float64(0.5)), of_quadrant)


def rotary_table(inv_freq: tuple[float, ...], sections: tuple[int, ...], scaling: float) -> PrimFunc:
    """Make the kernel (POSITIONS i32 [3, ld], TABLE f32 [T, R], T, ld_positions, tid, nt)."""
    half = len(inv_freq)
    axes = tuple(float(axis_of(i, sections)) for i in range(half))

    @T.prim_func(private=True, s_tir=True)
    def rotary_table_kernel(
        POSITIONS: T.handle("int32"),
        TABLE: T.handle("float32"),
        tokens: T.int64,
        ld_positions: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        positions = T.decl_buffer((3, ld_positions), "int32", data=POSITIONS)
        table = T.decl_buffer((tokens, 2 * half), "float32", data=TABLE)
        first: T.let[T.int64] = share(tokens, tid, nt)
        last: T.let[T.int64] = share(tokens, tid + 1, nt)
        for item in T.serial(last - first):
            t: T.let[T.int64] = first + item
            for i in T.unroll(half):
                angle: T.let[T.float32] = T.cast(
                    positions[T.cast(choose(axes, i, lambda v: T.int32(int(v))), "int64"), t], "float32"
                ) * choose(inv_freq, i, T.float32)
                exact: T.let[T.float64] = T.cast(angle, "float64")
                table[t, i] = T.cast(turned(exact, 1), "float32") * T.float32(scaling)
                table[t, half + i] = T.cast(turned(exact, 0), "float32") * T.float32(scaling)
        return T.int32(0)

    return rotary_table_kernel
