"""Products of bytes: the instruction that multiplies four u8 by four s8 in every int32 lane and adds them up."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.script import tirx as T

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.vectors import Expr, splat_int

_SIGN = "llvm.x86.avx2.psign.b"  # 16 words have no such instruction
_WIDEN = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
_SHUFFLE = {8: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.avx512.pshuf.b.512"}


def dot_bytes(isa: Isa, total: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """Return total + the four products of each int32 lane of u8 and s8, the latter from -127.

    Without VNNI two products are added in 16 bits, which 2 * 127 * 127 fits but 2 * 255 * 127 does not: unsigned bytes
    are multiplied in halves of 4 bits.
    """
    lanes = isa.lanes
    if isa.has_vnni:
        intrinsic = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512")
        operands = (total, as_bytes(unsigned, lanes), as_bytes(signed, lanes))
        return T.call_llvm_pure_intrin(intrinsic, *operands, dtype=f"int32x{lanes}")
    total = _add_pairs(lanes, total, low_halves(unsigned, lanes), signed, 1)
    return _add_pairs(lanes, total, high_halves(unsigned, lanes), signed, 16)


def add_products(isa: Isa, sums: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """Return the two 16-bit sums of each int32 lane plus the products of two of its u8 by two of its s8 each.

    Both products of a sum must fit 16 bits together; the sum wraps around.
    """
    kind, operands = f"int32x{isa.lanes}", (sums, unsigned, signed)
    return T.call_pure_extern(kind, f"q35c_add_products_x{isa.lanes}", *operands)


def scale_sums(isa: Isa, sums: Expr, scales: Expr) -> Expr:
    """Return for each int32 lane its two 16-bit sums, each times the scale in the same place, added up."""
    intrinsic = T.llvm_lookup_intrinsic_id(_WIDEN[isa.lanes])
    kind = f"int16x{2 * isa.lanes}"
    operands = (T.reinterpret(value, dtype=kind) for value in (sums, scales))
    return T.call_llvm_pure_intrin(intrinsic, *operands, dtype=f"int32x{isa.lanes}")


def dot_levels(total: Expr, levels: Expr, signed: Expr) -> Expr:
    """Return total + the four products of each of 8 int32 lanes of s8 levels, -128 among them, and s8 from -127 to 127.

    A level's magnitude, 128 at most, is the unsigned factor, and its sign moves to the other: two products fit 16 bits.
    """
    sign = T.llvm_lookup_intrinsic_id(_SIGN)
    level = as_bytes(levels, 8)
    magnitude = T.call_llvm_pure_intrin(sign, level, level, dtype="int8x32")
    moved = T.call_llvm_pure_intrin(sign, as_bytes(signed, 8), level, dtype="int8x32")
    unsigned, signed = (T.reinterpret(value, dtype="int32x8") for value in (magnitude, moved))
    return _add_pairs(8, total, unsigned, signed, 1)


def low_halves(words: Expr, lanes: int) -> Expr:
    """Return the low 4 bits of every byte."""
    return words & splat_int(0x0F0F0F0F, lanes)


def high_halves(words: Expr, lanes: int) -> Expr:
    """Return the high 4 bits of every byte."""
    return (words >> splat_int(4, lanes)) & splat_int(0x0F0F0F0F, lanes)


def look_up(table: Sequence[int], indices: Expr, lanes: int) -> Expr:
    """Return the bytes of a table of 16 at the indices in every byte, 0 to 15."""
    vector = _repeated(table, lanes)
    shuffle = T.llvm_lookup_intrinsic_id(_SHUFFLE[lanes])
    found = T.call_llvm_pure_intrin(
        shuffle, vector, as_bytes(indices, lanes), dtype=f"int8x{4 * lanes}"
    )
    return T.reinterpret(found, dtype=f"int32x{lanes}")


def look_up_modulo(table: Sequence[int], indices: Expr) -> Expr:
    """Return the bytes of a table of 16, 32 or 64 at the indices in every byte of 16 words, modulo its size; with VBMI."""
    permute = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.permvar.qi.512")
    operands = (_repeated(table, 16), as_bytes(indices, 16))
    found = T.call_llvm_pure_intrin(permute, *operands, dtype="int8x64")
    return T.reinterpret(found, dtype="int32x16")


def _repeated(table: Sequence[int], lanes: int) -> Expr:
    """Return a vector that a table of bytes fills, as often as it fits."""
    words = [int.from_bytes(bytes(table[at : at + 4]), "little") for at in range(0, len(table), 4)]
    constants = [T.int32(word) for word in words] * (lanes // len(words))
    return as_bytes(tirx.Shuffle(constants, [T.int32(lane) for lane in range(lanes)]), lanes)


def as_bytes(words: Expr, lanes: int) -> Expr:
    """Reinterpret int32 lanes as four times as many int8 lanes."""
    return T.reinterpret(words, dtype=f"int8x{4 * lanes}")


def _add_pairs(lanes: int, total: Expr, unsigned: Expr, signed: Expr, factor: int) -> Expr:
    factors = splat_int(factor * 0x10001, lanes)
    operands = (total, unsigned, signed, factors)
    return T.call_pure_extern(f"int32x{lanes}", f"q35c_dot_bytes_x{lanes}", *operands)
