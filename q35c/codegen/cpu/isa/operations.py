"""Operations on vectors that one instruction may do, and what each means, bit for bit, in numpy.

Operands are flat arrays of a register's elements, so many to a 4-byte lane; results are a register again. Where an operation
is defined for some values alone, its line says so; what instructions make of others may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Register = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """What kernels ask for: the element types of its operands and of its result, as numpy calls them."""

    name: str
    takes: tuple[str, ...]
    gives: str
    meaning: Callable[..., Register]


def _dot4(total: Register, unsigned: Register, signed: Register) -> Register:
    products = unsigned.astype(np.int32) * signed
    return total + products.reshape(-1, 4).sum(1, dtype=np.int32)


def _pair_sums(unsigned: Register, signed: Register) -> Register:
    """Return the sums of two products each, cut to what 16 bits hold."""
    products = unsigned.astype(np.int32) * signed
    return products.reshape(-1, 2).sum(1).clip(-(2**15), 2**15 - 1).astype(np.int16)


def _dot2(a: Register, b: Register) -> Register:
    products = a.astype(np.int64) * b
    return products.reshape(-1, 2).sum(1).astype(np.int32)


def _move_sign(values: Register, signs: Register) -> Register:
    return (values.astype(np.int16) * np.sign(signs)).astype(np.int8)


def _look_up(size: int) -> Callable[[Register, Register], Register]:
    def meaning(table: Register, indices: Register) -> Register:
        return table[:size][indices.view(np.uint8) % size]

    return meaning


def _bf16(bits: Register) -> Register:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _dot2_bf16(total: Register, a: Register, b: Register) -> Register:
    products = (_bf16(a) * _bf16(b)).reshape(-1, 2)  # exact: 16 bits of a mantissa
    return (total + products[:, 1]) + products[:, 0]


def _round_pairs(low: Register, high: Register) -> Register:
    words = np.concatenate((low, high)).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


_OPERATIONS = (
    # total + four products of u8 by s8 in each lane.
    Operation("dot4_u8s8", ("int32", "uint8", "int8"), "int32", _dot4),
    # The same of two products that fit 16 bits together, times the factor in their place.
    Operation(
        "dot4_u8s8_factors",
        ("int32", "uint8", "int8", "int16"),
        "int32",
        lambda total, u, s, factors: total + _dot2(_pair_sums(u, s), factors),
    ),
    # Two sums of 16 bits in each lane, and to each two products that fit 16 bits together; sums wrap around.
    Operation(
        "add2_u8s8", ("int16", "uint8", "int8"), "int16", lambda sums, u, s: sums + _pair_sums(u, s)
    ),
    # Two products of 16 bits in each lane, added up; to a total LLVM adds it, in one instruction where there is one.
    Operation("dot2_s16", ("int16", "int16"), "int32", _dot2),
    # Values times the signs of others: -1, 0 or 1.
    Operation("move_sign_s8", ("int8", "int8"), "int8", _move_sign),
    # The table of 16 bytes, repeated in a register, at indices from 0 to 15.
    Operation("lookup16", ("int8", "int8"), "int8", _look_up(16)),
    # The table of 64 bytes at indices modulo 64.
    Operation("lookup64", ("int8", "int8"), "int8", _look_up(64)),
    # total + two products of bf16 in each lane, the odd one first, each sum rounded; normal numbers.
    Operation("dot2_bf16", ("float32", "uint16", "uint16"), "float32", _dot2_bf16),
    # Two registers of f32 rounded to bf16, ties to even, the first in the lower half; normal numbers.
    Operation("round2_bf16", ("float32", "float32"), "uint16", _round_pairs),
    # x times 2^power, for whole powers; normal numbers.
    Operation("scale_f32", ("float32", "float32"), "float32", lambda x, power: np.ldexp(x, power.astype(np.int32))),
    # The largest lane, no NaN among them, in one number.
    Operation("max_f32", ("float32",), "float32", lambda x: x.max(keepdims=True)),
)  # fmt: skip
OPERATIONS = {operation.name: operation for operation in _OPERATIONS}
