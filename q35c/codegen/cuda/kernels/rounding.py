"""Rounding to int8 within a warp: each lane has four values, those of a group lie in neighbouring lanes.

    scale = max |x| / 127      q = nearest(x / scale)

A group that holds NaN or infinity gets such a scale, so what is not finite stays so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from q35c.codegen.cuda.kernels.make import Expr, T, add, let, local, store
from q35c.codegen.cuda.kernels.threads import bits_of, from_bits, shuffle_xor

VALUES = 4  # of a lane: one word of codes
_ROUND = (
    12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the mantissa
)
_ROUND_BITS = 0x4B400000
_MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True)
class Rounded:
    """A lane's word of codes and their sum, int32; the bits of its group's scale."""

    word: Expr
    total: Expr
    scale: Expr


def round_values(values: Expr, group: int) -> Rounded:
    """Round a lane's four values; all lanes of the warp must come here, as groups find their largest value together."""
    top, total, word = (local(name, (1,), "int32") for name in ("top", "total", "word"))
    store(top, 0, 0)
    for j in range(VALUES):
        store(top, T.max(top[0], T.bitwise_and(bits_of(values[j]), _MAGNITUDE)), 0)
    for distance in distances(group):
        store(top, T.max(top[0], shuffle_xor(top[0], distance)), 0)
    largest = let("largest", from_bits(top[0]))
    codes = nearest_codes(largest)
    store(total, 0, 0)
    store(word, 0, 0)
    for j in range(VALUES):
        code = let("code", codes(values[j]))
        add(total, code, 0)
        store(word, T.bitwise_or(word[0], T.shift_left(T.bitwise_and(code, 255), 8 * j)), 0)
    return Rounded(word, total, bits_of(largest * T.float32(1 / 127)))


def nearest_codes(largest: Expr) -> Callable[[Expr], Expr]:
    """Return what makes codes, int32, of values whose largest magnitude becomes 127."""
    factor = T.Select(largest == T.float32(0), T.float32(0), T.float32(127) / largest)
    inverse = let("inverse", factor)

    def code(value: Expr) -> Expr:
        nearest = bits_of(value * inverse + T.float32(_ROUND)) - _ROUND_BITS
        # Of what is not a number any code will do, but sums of them must not overflow.
        return T.max(T.min(nearest, 127), -127)

    return code


def distances(group: int) -> Iterator[int]:
    """Yield how far apart lanes are that meet, one after another, until all of a group have."""
    distance = group // VALUES // 2
    while distance:
        yield distance
        distance //= 2
