"""Products of bytes and look-ups in tables of them, from what an instruction set offers."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.script import tirx as T

from q35c.codegen.cpu.isa.apply import apply
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.vectors import Expr, splat_int


def dot_bytes(isa: Isa, total: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """Return total + the four products of each int32 lane of u8 and s8, the latter from -127.

    Without such an instruction two products are added in 16 bits, which 2 * 127 * 127 fits but 2 * 255 * 127 does not: unsigned bytes
    are multiplied in halves of 4 bits.
    """
    lanes = isa.lanes
    if isa.offers("dot4_u8s8"):
        return apply(isa, "dot4_u8s8", total, unsigned, signed)
    total = _add_pairs(isa, total, low_halves(unsigned, lanes), signed, 1)
    return _add_pairs(isa, total, high_halves(unsigned, lanes), signed, 16)


def dot_levels(isa: Isa, total: Expr, levels: Expr, signed: Expr) -> Expr:
    """Return total + the four products of each int32 lane of s8 levels, -128 among them, and s8 from -127 to 127.

    A level's magnitude, 128 at most, is the unsigned factor, and its sign moves to the other: two products fit 16 bits.
    """
    magnitude = apply(isa, "move_sign_s8", levels, levels)
    moved = apply(isa, "move_sign_s8", signed, levels)
    return _add_pairs(isa, total, magnitude, moved, 1)


def low_halves(words: Expr, lanes: int) -> Expr:
    """Return the low 4 bits of every byte."""
    return words & splat_int(0x0F0F0F0F, lanes)


def high_halves(words: Expr, lanes: int) -> Expr:
    """Return the high 4 bits of every byte."""
    return (words >> splat_int(4, lanes)) & splat_int(0x0F0F0F0F, lanes)


def look_up(isa: Isa, table: Sequence[int], indices: Expr) -> Expr:
    """Return the bytes of a table of 16 at the indices in every byte, 0 to 15."""
    return _words(isa, apply(isa, "lookup16", _repeated(table, isa.lanes), indices))


def look_up_modulo(isa: Isa, table: Sequence[int], indices: Expr) -> Expr:
    """Return the bytes of a table of 16, 32 or 64 at the indices in every byte, modulo its size."""
    return _words(isa, apply(isa, "lookup64", _repeated(table, isa.lanes), indices))


def _repeated(table: Sequence[int], lanes: int) -> Expr:
    """Return a vector that a table of bytes fills, as often as it fits."""
    words = [int.from_bytes(bytes(table[at : at + 4]), "little") for at in range(0, len(table), 4)]
    constants = [T.int32(word) for word in words] * (lanes // len(words))
    return as_bytes(tirx.Shuffle(constants, [T.int32(lane) for lane in range(lanes)]), lanes)


def as_bytes(words: Expr, lanes: int) -> Expr:
    """Reinterpret int32 lanes as four times as many int8 lanes."""
    return T.reinterpret(words, dtype=f"int8x{4 * lanes}")


def _words(isa: Isa, vector: Expr) -> Expr:
    return T.reinterpret(vector, dtype=f"int32x{isa.lanes}")


def _add_pairs(isa: Isa, total: Expr, unsigned: Expr, signed: Expr, factor: int) -> Expr:
    factors = splat_int(factor * 0x10001, isa.lanes)
    return apply(isa, "dot4_u8s8_factors", total, unsigned, signed, factors)
