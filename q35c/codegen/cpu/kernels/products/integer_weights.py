"""Integer weights on their way to the byte products: from a packed block, or from a part of it that lies unpacked.

Both give, for a set of inputs of a group, the unsigned levels of 4 inputs at a time, one int32 word for each output,
and the outputs' scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.isa.byte_products import (
    as_bytes,
    high_halves,
    look_up,
    look_up_modulo,
    low_halves,
)
from q35c.codegen.cpu.kernels.products.narrow_tile_avx2 import AHEAD_BYTES, SCALE_BITS, WHOLE_SCALES
from q35c.codegen.cpu.kernels.vectors import (
    STACK,
    Expr,
    bits,
    fetch,
    from_bits,
    let,
    ramp,
    splat_int,
    vector,
)
from q35c.formats.integer import IntegerFormat
from q35c.layouts.weights import BLOCK, LINE_WORDS, IntegerBlock

Parts = Callable[[int], list[Expr]]  # 4 inputs of a set -> their words, a vector for each `Vectors`


@dataclass(frozen=True)
class IntegerLayout(IntegerBlock):
    """A block of integers as an instruction set reads it."""

    isa: Isa

    @property
    def has_narrow_sums(self) -> bool:
        """Whether products are added up in 16 bits and scales are integers (narrow_sums.py)."""
        return self.form.bits != 8 and not self.isa.offers("dot4_u8s8")


class Weights(Protocol):
    """What a tile reads of a block of weights. `group` counts in the whole row."""

    @property
    def layout(self) -> IntegerLayout: ...

    def parts(self, group: Expr, number: Expr, vectors: Sequence[int]) -> Parts:
        """Return how to get the words of a set's inputs."""
        ...

    def scales(self, group: Expr, vectors: Sequence[int]) -> list[Expr]:
        """Return the outputs' scales: f32, or a pair of equal int16 that `factors` complete."""
        ...


@dataclass(frozen=True)
class Packed:
    """Read a block of w [blocks, words] as it is stored; `runs_ahead` fetches what comes later."""

    layout: IntegerLayout
    w: Expr
    block: Expr
    runs_ahead: bool

    def parts(self, group: Expr, number: Expr, vectors: Sequence[int]) -> Parts:
        layout, size = self.layout, self.layout.isa.lanes
        start = layout.set_start(group, number)
        if self.runs_ahead and 0 in vectors:  # the first pass over a line
            _fetch_lines(self.w, self.block, start + AHEAD_BYTES // 4, layout.set_lines)
        # Bound in the order in which they lie: the processor's own prefetching loses a stream whose lines are first
        # touched out of order (measured: one row of 5 bits 3 to 15 % slower).
        lines = [
            [
                T.Bind(self.w[self.block, ramp(start + line * BLOCK + v * size, size)])
                for v in vectors
            ]
            for line in range(layout.set_lines)
        ]
        by_vector = list(zip(*lines, strict=True))
        return lambda part: [unpack_part(layout, stored, part) for stored in by_vector]

    def scales(self, group: Expr, vectors: Sequence[int]) -> list[Expr]:
        size, start = self.layout.isa.lanes, self.layout.scales_start(group)
        codes = [self._bytes(start, v, "int8") for v in vectors]
        if self.layout.has_narrow_sums:
            return [whole_scale_of(code, size) for code in codes]
        exponents = (self._bytes(0, v, "uint8") for v in vectors)
        return [scale_of(*pair, size) for pair in zip(codes, exponents, strict=True)]

    def factors(self, vectors: Sequence[int]) -> list[Expr]:
        """Return for each output the power of two, f32, by which integer scales are too large."""
        size = self.layout.isa.lanes
        exponents = (self._bytes(0, v, "uint8") - splat_int(4, size) for v in vectors)
        return [
            from_bits(T.max(exponent, splat_int(0, size)) << splat_int(23, size), size)
            for exponent in exponents
        ]

    def _bytes(self, start: Expr, v: int, dtype: str) -> Expr:
        """Return the bytes of the outputs of vector v in a line that begins at word `start`, as int32."""
        size = self.layout.isa.lanes
        words = self.w[self.block, ramp(start + v * (size // 4), size // 4)]
        return T.cast(T.reinterpret(words, dtype=vector(dtype, size)), vector("int32", size))


def scale_of(code: Expr, exponent: Expr, lanes: int) -> Expr:
    """Return the f32 scales of codes that were widened with their sign, and of their rows' exponents."""
    steps = (code << splat_int(19, lanes)) & splat_int(SCALE_BITS, lanes)
    return from_bits(steps + (exponent << splat_int(23, lanes)), lanes)


def whole_scale_of(code: Expr, lanes: int) -> Expr:
    """Return pairs of equal int16, the scales of widened codes for an exponent with which all are integers, up to 3,968."""
    steps = (code << splat_int(19, lanes)) & splat_int(SCALE_BITS, lanes)
    scale = from_bits(steps + splat_int(WHOLE_SCALES, lanes), lanes)

    def pair(whole: Expr) -> Expr:
        return (whole & splat_int(0xFFFF, lanes)) | (whole << splat_int(16, lanes))

    return let(T.cast(scale, vector("int32", lanes)), pair)


def _fetch_lines(w: Expr, block: Expr, start: Expr, lines: int) -> None:
    """Emit prefetches of some lines into L1. A tile of few rows alternates between waiting for memory and multiplying.

    Measured: tiles of 4 to 8 rows 20 to 35 % faster with 4 bits and up to twice as fast with 5; a distance of 2 KiB
    or a prefetch into L2 gains less. One row becomes up to 15 % slower with VNNI, and up to 3 times as fast without.
    """
    for word in range(0, lines * BLOCK, LINE_WORDS):
        fetch(w[block, start + word], 1)


@dataclass(frozen=True)
class Unpacked:
    """Read a panel [groups, words + 1, vectors] of the groups from `first` on: levels, and in the last line scales."""

    layout: IntegerLayout
    panel: Expr
    first: Expr

    @property
    def words(self) -> int:
        return self.layout.form.group // 4

    def parts(self, group: Expr, number: Expr, vectors: Sequence[int]) -> Parts:
        at, word = group - self.first, number * self.layout.set_words
        return lambda part: [self.panel[at, word + part, v] for v in vectors]

    def scales(self, group: Expr, vectors: Sequence[int]) -> list[Expr]:
        found = [self.panel[group - self.first, self.words, v] for v in vectors]
        if self.layout.has_narrow_sums:
            return found
        return [from_bits(scale, self.layout.isa.lanes) for scale in found]


def unpack_groups(packed: Packed, first: Expr, count: Expr, most: int) -> Unpacked:
    """Emit the unpacking of `count` groups, at most `most`, to the stack."""
    layout = packed.layout
    size, form = layout.isa.lanes, layout.form
    vectors = range(BLOCK // size)
    shape = (most, form.group // 4 + 1, len(vectors))
    panel = T.alloc_buffer(shape, f"int32x{size}", annotations=STACK)
    unpacked = Unpacked(layout, panel, first)
    with T.serial(count) as at:
        for v, scale in zip(vectors, packed.scales(first + at, vectors), strict=True):
            kept = scale if layout.has_narrow_sums else bits(scale, size)
            T.buffer_store(panel, kept, [at, unpacked.words, v])
        with T.serial(T.int64(layout.sets)) as number:
            parts = packed.parts(first + at, number, vectors)
            for part in range(layout.set_words):
                for v, value in zip(vectors, parts(part), strict=True):
                    T.buffer_store(panel, value, [at, number * layout.set_words + part, v])
    return unpacked


def unpack_part(layout: IntegerLayout, lines: Sequence[Expr], part: int) -> Expr:
    """Return the unsigned levels of the inputs 4 part.. of a set from the lines that store it; see `pack_words`."""
    form, isa, lanes = layout.form, layout.isa, layout.isa.lanes
    if form.bits == 8:
        return lines[part]
    if isa.offers("lookup64"):
        return _permuted(isa, form, lines, part)
    first = 1 if form.bits == 5 else 0
    low = (high_halves if part % 2 else low_halves)(lines[first + part // 2], lanes)
    unsigned = [level + form.zero_point for level in form.levels]
    if form.bits == 4:
        return look_up(isa, unsigned, low)
    # As the sign of its byte, the fifth bit is what a blend of bytes looks at.
    signs = as_bytes(lines[0] << splat_int(7 - part, lanes) if part < 7 else lines[0], lanes)
    is_high = signs < T.broadcast(T.int8(0), 4 * lanes)
    both = [as_bytes(look_up(isa, half, low), lanes) for half in (unsigned[16:], unsigned[:16])]
    return T.reinterpret(T.Select(is_high, *both), dtype=f"int32x{lanes}")


def _permuted(isa: Isa, form: IntegerFormat, lines: Sequence[Expr], part: int) -> Expr:
    """Return the unsigned levels with one permutation, which ignores what lies above the bits of a code."""
    table = [level + form.zero_point for level in form.levels]
    low = lines[(1 if form.bits == 5 else 0) + part // 2]
    if part % 2:
        low = low >> splat_int(4, isa.lanes)
    if form.bits == 4:
        return look_up_modulo(isa, table, low)
    # Bit `part` of every byte of the first line becomes its bit 4.
    high = lines[0]
    if part != 4:
        distance = splat_int(abs(part - 4), isa.lanes)
        high = high << distance if part < 4 else high >> distance
    low, high = low & splat_int(0x0F0F0F0F, isa.lanes), high & splat_int(-0x0F0F0F10, isa.lanes)
    codes = low | high
    return look_up_modulo(isa, table, codes)
