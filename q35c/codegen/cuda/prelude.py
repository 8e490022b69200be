"""Functions that kernels call by name, in CUDA: what TIR cannot say in few words. They stand before the first kernel."""

from __future__ import annotations

import struct

from q35c.formats.integer import IntegerFormat


def _table(levels: tuple[int, ...]) -> list[str]:
    """Return levels as words of four bytes."""
    data = struct.pack(f"{len(levels)}b", *levels)
    return [f"0x{word:08x}u" for word in struct.unpack(f"<{len(levels) // 4}I", data)]


_FOUR, _FIVE = _table(IntegerFormat(4, 64).levels), _table(IntegerFormat(5, 64).levels)

PRELUDE = f"""
// Of four codes in the low 16 bits, four bits each, the bytes of a table of 16; bit 3 of each chooses the half.
static __device__ __forceinline__ unsigned q35c_look_up(unsigned codes, unsigned a, unsigned b, unsigned c, unsigned d) {{
  unsigned low = __byte_perm(a, b, codes & 0x7777u), high = __byte_perm(c, d, codes & 0x7777u);
  return __byte_perm(low, high, 0x3210u | (codes & 0x8888u) >> 1);
}}
// Levels of the codes in a word's low or high halves of bytes.
static __device__ __forceinline__ int q35c_levels4(unsigned codes, int is_high) {{
  unsigned a = q35c_look_up(codes & 0xffffu, {", ".join(_FOUR)});
  unsigned b = q35c_look_up(codes >> 16, {", ".join(_FOUR)});
  return (int)__byte_perm(a, b, is_high ? 0x7531u : 0x6420u);
}}
// The same with a fifth bit of each code, bit `at` of the bytes of `fifth`.
static __device__ __forceinline__ int q35c_levels5(unsigned codes, unsigned fifth, int is_high, int at) {{
  unsigned order = is_high ? 0x7531u : 0x6420u;
  unsigned low = __byte_perm(q35c_look_up(codes & 0xffffu, {", ".join(_FIVE[:4])}),
                             q35c_look_up(codes >> 16, {", ".join(_FIVE[:4])}), order);
  unsigned high = __byte_perm(q35c_look_up(codes & 0xffffu, {", ".join(_FIVE[4:])}),
                              q35c_look_up(codes >> 16, {", ".join(_FIVE[4:])}), order);
  unsigned mask = (fifth >> at & 0x01010101u) * 0xffu;
  return (int)((low & ~mask) | (high & mask));
}}
// Round to bf16, nearest even; NaN stays NaN.
static __device__ __forceinline__ unsigned q35c_bf16(float x) {{
  unsigned bits = __float_as_uint(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}}
"""
