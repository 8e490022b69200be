"""Vector helpers shared by every kernel family.

Each helper is a Python function that returns a TIR expression, so a kernel may call it inside TVMScript; `lanes` is
the vector width, and 1 gives the scalar form of the same formula. Nothing here calls libm: LLVM would split a vector
`exp` into one call per lane and the shared object would import `expf`.

A sub-expression that Python shares is emitted once per use. `let` binds it, and so does `x: T.let[T.float32] = ...`
in a kernel body. A plain `x = ...` there would become a memory buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

Expr = Any  # a TIR expression, or a Python number where one is accepted

# Put on every `T.alloc_buffer(..., annotations=STACK)` of 1 KiB or more: without it the buffer becomes a heap call.
STACK = {"disable_lower_builtin": T.int32(1)}


def vector(dtype: str, lanes: int) -> str:
    """Name the vector type of `lanes` elements; one lane is the scalar type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def ramp(start: Expr, lanes: int) -> Expr:
    """Index `lanes` consecutive elements from `start`."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def splat(value: Expr, lanes: int) -> Expr:
    """Repeat one value in every lane; a Python float or int becomes f32."""
    scalar = T.float32(float(value)) if isinstance(value, int | float) else value
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def splat_int(value: Expr, lanes: int) -> Expr:
    """Repeat one int32 value in every lane."""
    scalar = T.int32(value) if isinstance(value, int) else value
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """Compute `value` once and return `body` of it."""
    name = tirx.Var("t", value.ty)
    return tirx.Let(name, value, body(name))


def bits(value: Expr, lanes: int) -> Expr:
    """Reinterpret f32 lanes as int32."""
    return T.reinterpret(value, dtype=vector("int32", lanes))


def from_bits(value: Expr, lanes: int) -> Expr:
    """Reinterpret int32 lanes as f32."""
    return T.reinterpret(value, dtype=vector("float32", lanes))


def horner(x: Expr, coefficients: Sequence[float], lanes: int) -> Expr:
    """Evaluate a polynomial, highest power first; each step contracts to one fused multiply-add."""
    result = splat(coefficients[0], lanes)
    for coefficient in coefficients[1:]:
        result = result * x + splat(coefficient, lanes)
    return result


# exp(r) = 1 + r + r^2 * tail(r) on |r| <= ln2/2; minimax, relative error 8e-8 over the whole range.
_EXP_TAIL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_ROUND = (
    12582912.0  # 1.5 * 2^23: adding it rounds to the nearest integer, kept in the low mantissa bits
)
_ROUND_BITS = 0x4B400000
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def vexp(x: Expr, lanes: int) -> Expr:
    """Return exp(x) to 8e-8; x is clamped to [-87.33, 88.37] so that no result is 0 or infinite; NaN stays NaN."""

    def scale(rounded: Expr, power: Expr) -> Expr:
        exponent = (bits(rounded, lanes) - splat_int(_ROUND_BITS, lanes)) << splat_int(23, lanes)
        return from_bits(bits(power, lanes) + exponent, lanes)

    def reduce(x: Expr) -> Expr:
        def polynomial(r: Expr) -> Expr:
            return horner(r, _EXP_TAIL, lanes) * (r * r) + r + splat(1.0, lanes)

        def remainder(rounded: Expr) -> Expr:
            n = rounded - splat(_ROUND, lanes)
            r = let(n, lambda n: x - n * splat(_LN2_HIGH, lanes) - n * splat(_LN2_LOW, lanes))
            return scale(rounded, let(r, polynomial))

        return let(x * splat(1.44269504088896341, lanes) + splat(_ROUND, lanes), remainder)

    # The second operand of min and max survives when one is NaN: x must be it, twice.
    return let(T.min(splat(88.37, lanes), T.max(splat(-87.33, lanes), x)), reduce)


def nearest(x: Expr, lanes: int) -> Expr:
    """Return int32 lanes whose low 16 bits are the integer nearest to x, for |x| < 2^15; the others mean nothing."""
    return bits(x + splat(_ROUND, lanes), lanes)


def vsigmoid(x: Expr, lanes: int) -> Expr:
    """Return 1 / (1 + exp(-x)) to 1.5e-7."""
    return splat(1.0, lanes) / (splat(1.0, lanes) + vexp(splat(0.0, lanes) - x, lanes))


def vsilu(x: Expr, lanes: int) -> Expr:
    """Return x * sigmoid(x) to 1.5e-7."""
    return let(x, lambda x: x / (splat(1.0, lanes) + vexp(splat(0.0, lanes) - x, lanes)))


def vlog1p_unit(u: Expr, lanes: int) -> Expr:
    """Return log(1 + u) for u in [0, 1], as 2 atanh(u / (2 + u))."""

    def series(s: Expr) -> Expr:
        terms = (2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)
        return let(s * s, lambda z: s * horner(z, terms, lanes))

    # u is bound: it is often an exponential, which must not be computed, or bound, twice.
    return let(u, lambda u: let(u / (u + splat(2.0, lanes)), series))


def vrsqrt(x: Expr, lanes: int) -> Expr:
    """Return 1 / sqrt(x), correctly rounded twice."""
    return splat(1.0, lanes) / T.sqrt(x)


# Reductions over lanes


def hsum(x: Expr, lanes: int) -> Expr:
    """Add the lanes of an f32 vector in a fixed tree order."""
    return T.call_pure_extern("float32", f"q35c_sum_f32x{lanes}", x)


def hmax(x: Expr, lanes: int) -> Expr:
    """Return the largest lane of an f32 vector; lanes that are NaN do not count."""
    return _reduce("fmax", x, "float32")


def hmin_int(x: Expr, lanes: int) -> Expr:
    """Return the smallest lane of an int32 vector."""
    return _reduce("smin", x, "int32")


def magnitude(x: Expr, lanes: int) -> Expr:
    """Return |x| of an f32 vector as integers, which compare as floats do; NaN is the largest."""
    return bits(x, lanes) & splat_int(0x7FFFFFFF, lanes)


def largest_magnitude(vectors: Sequence[Expr], lanes: int) -> Expr:
    """Return the largest |x| of f32 vectors; NaN if one of them holds NaN."""
    largest, *others = (magnitude(x, lanes) for x in vectors)
    for one in others:
        largest = T.max(largest, one)
    return from_bits(_reduce("smax", largest, "int32"), 1)


def _reduce(operation: str, x: Expr, dtype: str) -> Expr:
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.vector.reduce.{operation}")
    return T.call_llvm_pure_intrin(intrinsic, x, dtype=dtype)


def fetch(element: Expr, level: int) -> None:
    """Emit a prefetch of an element's cache line into L1 or L2, to be read; it may lie behind the buffer's end."""
    prefetch = T.llvm_lookup_intrinsic_id("llvm.prefetch")
    read_data = [T.int32(flag) for flag in (0, 4 - level, 1)]
    T.evaluate(T.call_llvm_intrin("void", prefetch, T.address_of(element), *read_data))


# bfloat16: TVM cannot emit bfloat vectors, so bf16 travels as integers


def widen_low(pairs: Expr, lanes: int) -> Expr:
    """Return the low bf16 of every int32 pair (the even k of packed weights) as f32."""
    return from_bits(pairs << splat_int(16, lanes), lanes)


def widen_high(pairs: Expr, lanes: int) -> Expr:
    """Return the high bf16 of every int32 pair (the odd k of packed weights) as f32."""
    return from_bits(pairs & splat_int(-65536, lanes), lanes)


def widen(halves: Expr, lanes: int) -> Expr:
    """Return uint16 lanes that hold bf16 as f32."""
    return from_bits(T.cast(halves, vector("int32", lanes)) << splat_int(16, lanes), lanes)


def narrow(x: Expr, lanes: int) -> Expr:
    """Round f32 lanes to bf16, nearest even, as uint16."""

    def rounded(word: Expr) -> Expr:
        odd = (word >> splat_int(16, lanes)) & splat_int(1, lanes)
        return T.cast(
            (word + splat_int(0x7FFF, lanes) + odd) >> splat_int(16, lanes), vector("uint16", lanes)
        )

    return let(bits(x, lanes), rounded)


# Work split


def share(count: Expr, part: Expr, parts: Expr) -> Expr:
    """Return where share number `part` of `parts` begins among `count` items, all int64.

    Thread `tid` of `nt` owns items share(n, tid, nt) up to share(n, tid + 1, nt).
    """
    return T.truncdiv(T.cast(count, "int64") * T.cast(part, "int64"), T.cast(parts, "int64"))


def vector_type(dtype: str, lanes: int) -> Expr:
    """Return the TVMScript type of a vector, for `name: T.let[vector_type("float32", n)]`."""
    return getattr(T, vector(dtype, lanes))
