"""Tiles with sums of 16 bits (narrow_sums.py) as AVX2 instructions.

As assembly because they live from the number of instructions, loads and moves included: Zen 3 ends 4.6 of them a cycle,
whatever they are. The tile of 6 rows takes 3.3 for 4 inputs of a row and vector; LLVM makes 4.3 of the same statements, as it
spills what 16 registers would just hold, and then 6 rows are no faster than 4 with sums of 32 bits. The loop takes 32 inputs:
written out for a group of 128 it is a third slower, as its 1,200 instructions come from the decoders.

A tile reads levels from a panel, where many tiles share what was unpacked, or unpacks them itself from a packed block. From
a block three rows and more take each group twice, for half of its outputs each: their sums need the registers, and a
block read twice from front to back would ask memory for all of it in half of the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from q35c.formats.integer import SUM_INPUTS, IntegerFormat
from q35c.layouts.weights import BLOCK

TALLEST = 6  # rows: more have no registers for their sums
_LINE = (
    4 * BLOCK
)  # bytes of a word of a panel, of a stored line, and of a row of f32 sums: 32 outputs
_WORDS = SUM_INPUTS // 4
AHEAD_BYTES = 4096  # how far reading a packed block runs ahead of what is multiplied
_REGISTERS = 16
# Of f32: what a scale's byte holds, sign, 3 bits of the exponent and 4 of the mantissa; and the least exponent with which all
# scales are integers.
SCALE_BITS = -0x7C080000
WHOLE_SCALES = (127 + 4) << 23

# Vectors of constants in memory.
_NIBBLES, _TABLE, _LOW_TABLE, _HIGH_TABLE, _SCALE_MASK, _SCALE_BASE = range(6)

# Operands of the assembly: what it advances, then what stays. The inputs in between are tied to the first ones.
_MOVED = ("codes", "scales", "starts", "weights", "columns")
_CODES, _SCALES, _STARTS, _WEIGHTS, _COLUMNS, _SCRATCH, _CONSTANTS, _END, _OUT, _ROW0 = range(10)  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """A tile of some rows; `bits` of the codes that it unpacks, 0 for a panel."""

    rows: int
    group: int
    bits: int

    @property
    def name(self) -> str:
        return f"q35c_narrow_{self.bits}_{self.group}_{self.rows}"

    @property
    def vectors(self) -> int:
        """Vectors of the 4 of a line that it takes at a time."""
        return 4 if self.rows <= 2 and self.bits else 2

    @property
    def takes_halves(self) -> bool:
        """Whether it takes all outputs, those of half a line at a time."""
        return bool(self.bits) and self.vectors == 2

    @property
    def sums(self) -> int:
        return self.rows * self.vectors

    @property
    def levels(self) -> int:
        """The first register of the levels of 4 inputs; the sums lie before."""
        return self.sums

    @property
    def row(self) -> int:
        """The register of a word of a row."""
        return self.sums + self.vectors

    @property
    def product(self) -> int:
        return self.row + 1

    @property
    def resident(self) -> dict[int, int]:
        """The registers of constants that fit: the more often one is used, the sooner."""
        wanted = {0: (), 4: (_TABLE, _NIBBLES), 5: (_LOW_TABLE, _HIGH_TABLE, _NIBBLES)}[self.bits]
        return dict(zip(wanted, range(self.product + 1, _REGISTERS), strict=False))

    @property
    def lines(self) -> int:
        """Lines that hold 32 inputs."""
        return {0: _WORDS, 4: _WORDS // 2, 5: _WORDS // 2 + 1}[self.bits]

    def ir(self) -> str:
        """Return the LLVM function and the constants it reads.

        Its arguments are the rows, the offsets in them of the first group's codes, scale and starts, where its levels
        or lines begin and where its columns' scales, f32 sums [rows, 32] to which it adds, and the number of groups.
        Offsets count bytes; pointers to levels, scales and sums count from the first output.
        """
        rows = ", ".join(f"ptr %row{i}" for i in range(self.rows))
        moved = ", ".join(f"i64 %{name}" for name in _MOVED)
        results = f"{{ {', '.join(['i64'] * len(_MOVED))} }}"
        clobbers = [f"xmm{i}" for i in range(_REGISTERS)] + ["memory", "dirflag", "fpsr", "flags"]
        constraints = ["=&r"] * len(_MOVED) + ["=*m", "*m"] + ["r"] * (2 + self.rows)
        constraints += [str(i) for i in range(len(_MOVED))] + [f"~{{{name}}}" for name in clobbers]
        memory = f"ptr elementtype({_SCRATCH_TYPE}) %scratch, ptr elementtype({_CONSTANTS_TYPE}) @q35c_narrow_constants"
        text = "\\0A".join(self._instructions())
        return f"""{_constants()}
define linkonce_odr hidden i32 @{self.name}({rows}, {moved}, ptr %sums, i64 %count) noinline {{
  %scratch = alloca {_SCRATCH_TYPE}, align 16
  %inputs = mul i64 %count, {self.group}
  %end = add i64 %codes, %inputs
  %r = call {results} asm sideeffect "{text}", "{",".join(constraints)}"({memory}, i64 %end, ptr %sums, {rows}, {moved})
  ret i32 0
}}
"""

    def _instructions(self) -> list[str]:
        """Return a loop over groups, and in it one over 32 inputs."""
        lines = [f"vmovdqa {_constant(one)}, %ymm{to}" for one, to in self.resident.items()]
        if self.takes_halves:
            lines.append(f"movl $$0, {_HALF}")
        lines += ["1:", *(self._unpack_scales() if self.bits else ()), "2:"]
        for word in range(_WORDS):
            lines += self._fetch(word) if self.bits else ()
            lines += self._load_levels(word) if not self.bits else self._unpack_levels(word)
            lines += self._multiply(word)
        lines += _advance({_CODES: SUM_INPUTS, _STARTS: 4, _WEIGHTS: self.lines * _LINE})
        lines += self._end_inputs()
        lines += self._other_half() if self.takes_halves else ()
        lines += [*_advance({_SCALES: 4}), *(self._next_packed() if self.bits else self._next())]
        return [*lines, f"cmpq ${_END}, ${_CODES}", "jne 1b"]

    def _load_levels(self, word: int) -> Iterable[str]:
        for v in range(self.vectors):
            yield f"vmovdqa {word * _LINE + 32 * v}(${_WEIGHTS}), %ymm{self.levels + v}"

    def _unpack_levels(self, word: int) -> Iterable[str]:
        """Yield the look-up of the levels of 4 inputs: of the low or high halves of a line's bytes, two words each."""
        code = f"%ymm{self.product}"
        first_line = 1 if self.bits == 5 else 0
        for v in range(self.vectors):
            line = f"{(first_line + word // 2) * _LINE + 32 * v}(${_WEIGHTS})"
            if word % 2 == 0 and _NIBBLES in self.resident:
                yield f"vpand {line}, %ymm{self.resident[_NIBBLES]}, {code}"
            else:
                yield f"vmovdqu {line}, {code}"
                if word % 2:
                    yield f"vpsrld $$4, {code}, {code}"
                nibbles = self.resident.get(_NIBBLES)
                where = _constant(_NIBBLES) if nibbles is None else f"%ymm{nibbles}"
                yield f"vpand {where}, {code}, {code}"
            level = self.levels + v
            if self.bits == 4:
                yield from self._look_up(_TABLE, code, level)
                continue
            other = self.row  # no word of a row is there yet
            yield from self._look_up(_LOW_TABLE, code, level)
            yield from self._look_up(_HIGH_TABLE, code, other)
            # As the sign of its byte, the fifth bit is what a blend of bytes looks at.
            yield f"vmovdqu {32 * v}(${_WEIGHTS}), {code}"
            if word < 7:
                yield f"vpslld $${7 - word}, {code}, {code}"
            yield f"vpblendvb {code}, %ymm{other}, %ymm{level}, %ymm{level}"

    def _look_up(self, table: int, code: str, to: int) -> Iterable[str]:
        held = self.resident.get(table)
        if held is None:
            yield f"vmovdqa {_constant(table)}, %ymm{to}"
        yield f"vpshufb {code}, %ymm{to if held is None else held}, %ymm{to}"

    def _multiply(self, word: int) -> Iterable[str]:
        """Yield the products of 4 inputs; the first ones join what a sum starts with."""
        for i in range(self.rows):
            if word == 0:
                yield f"vpbroadcastd (${_ROW0 + i}, ${_STARTS}), %ymm{self.product}"
            yield f"vpbroadcastd {4 * word}(${_ROW0 + i}, ${_CODES}), %ymm{self.row}"
            for v in range(self.vectors):
                total = i * self.vectors + v
                product = total if word == 0 else self.product
                yield f"vpmaddubsw %ymm{self.row}, %ymm{self.levels + v}, %ymm{product}"
                yield f"vpaddw %ymm{self.product}, %ymm{total}, %ymm{total}"

    def _end_inputs(self) -> Iterable[str]:
        """Yield the ends of 32 inputs: of the first of a group, those between, the last."""
        parts = self.group // SUM_INPUTS
        if parts > 1:
            yield from (f"testb $${self.group - 1}, ${{{_CODES}:b}}", "je 7f")
        if parts > 2:
            yield from (f"testb $${self.group - 1 - SUM_INPUTS}, ${{{_CODES}:b}}", "je 6f")
            yield from (*self._scale_sums(joins=True, waits=True), "jmp 2b", "6:")
        if parts > 1:
            yield from (*self._scale_sums(joins=False, waits=True), "jmp 2b", "7:")
        yield from self._scale_sums(joins=parts > 1, waits=False)

    def _scale_sums(self, joins: bool, waits: bool) -> Iterable[str]:
        """Yield sums times the column's scale, in 32 bits: they may join those that wait, and then wait in their place, or
        times the row's scale join those in f32.
        """
        for i in range(self.rows):
            if not waits:
                yield f"vbroadcastss (${_ROW0 + i}, ${_SCALES}), %ymm{self.row}"
            for v in range(self.vectors):
                total, place = i * self.vectors + v, f"{i * _LINE + 32 * v}(${_OUT})"
                waiting = f"{_WAITING + 32 * total}+${_SCRATCH}"
                scale = f"{32 * v}+${_SCRATCH}" if self.bits else f"{32 * v}(${_COLUMNS})"
                yield f"vpmaddwd {scale}, %ymm{total}, %ymm{total}"
                if joins:
                    yield f"vpaddd {waiting}, %ymm{total}, %ymm{total}"
                if waits:
                    yield f"vmovdqu %ymm{total}, {waiting}"
                    continue
                yield f"vcvtdq2ps %ymm{total}, %ymm{total}"
                yield f"vfmadd213ps {place}, %ymm{self.row}, %ymm{total}"
                yield f"vmovups %ymm{total}, {place}"

    def _unpack_scales(self) -> Iterable[str]:
        """Yield the making of pairs of equal int16 from the bytes of a group's scales; see `whole_scale_of`."""
        one, two = f"%ymm{self.row}", f"%ymm{self.product}"
        for v in range(self.vectors):
            yield f"vpmovsxbd {8 * v}(${_COLUMNS}), {one}"
            yield f"vpslld $$19, {one}, {one}"
            yield f"vpand {_constant(_SCALE_MASK)}, {one}, {one}"
            yield f"vpaddd {_constant(_SCALE_BASE)}, {one}, {one}"
            yield f"vcvttps2dq {one}, {one}"
            yield f"vpslld $$16, {one}, {two}"
            yield f"vpblendw $$0xAA, {two}, {one}, {one}"
            yield f"vmovdqu {one}, {32 * v}+${_SCRATCH}"

    def _fetch(self, word: int) -> Iterable[str]:
        """Yield the part before a word: of 4 bits one by one, which makes one row 1 to 5 % faster, but one of 5 bits slower."""
        lines = range(0, self.lines * _LINE, _LINE if self.takes_halves else _LINE // 2)
        turns = _WORDS if self.bits == 4 else 1
        for line in lines[word::turns] if word < turns else ():
            yield f"prefetcht0 {AHEAD_BYTES + line}(${_WEIGHTS})"

    def _next(self) -> Iterable[str]:
        """Yield the step over a panel's line of scales."""
        return _advance({_WEIGHTS: _LINE, _COLUMNS: (self.group // 4 + 1) * _LINE})

    def _next_packed(self) -> Iterable[str]:
        """Yield the step to the next scales, of the same pair of groups or of the next pair, and over the latter."""
        pair = 2 * self.group // SUM_INPUTS * self.lines * _LINE
        yield from (f"testl $${self.group}, ${{{_CODES}:k}}", "je 3f")
        yield from (*_advance({_COLUMNS: 32}), "jmp 4f", "3:")
        yield from (*_advance({_COLUMNS: 32 + pair, _WEIGHTS: 64}), "4:")

    def _other_half(self) -> Iterable[str]:
        """Yield the way back to the first inputs of the group, for the second half of its outputs; or to the first half."""
        parts = self.group // SUM_INPUTS
        half = {_WEIGHTS: _LINE // 2, _COLUMNS: BLOCK // 2, _OUT: _LINE // 2}
        group = {_CODES: self.group, _STARTS: 4 * parts, _WEIGHTS: parts * self.lines * _LINE}
        yield from (f"xorl $$1, {_HALF}", "je 5f")
        yield from _advance({at: half.get(at, 0) - group.get(at, 0) for at in {**half, **group}})
        yield from ("jmp 1b", "5:", *_advance({at: -step for at, step in half.items()}))


# Bytes of the scratch: a line of scales, sums of 32 bits, which half of the outputs.
_WAITING = _LINE
_HALF = f"{_WAITING + 32 * 2 * TALLEST}+${_SCRATCH}"
_SCRATCH_TYPE = f"[{(_WAITING + 32 * 2 * TALLEST) // 4 + 1} x i32]"
_CONSTANTS_TYPE = "[48 x i32]"


def _constant(number: int) -> str:
    return f"{32 * number}+${_CONSTANTS}"


def _advance(steps: dict[int, int]) -> list[str]:
    return [f"addq $${step}, ${operand}" for operand, step in steps.items()]


def _words(table: Sequence[int]) -> list[int]:
    """Return a vector that 16 bytes fill twice, as signed words."""
    octets = bytes(table) * 2
    words = (octets[at : at + 4] for at in range(0, 32, 4))
    return [int.from_bytes(word, "little", signed=True) for word in words]


def _constants() -> str:
    four, five = (IntegerFormat(bits, 64) for bits in (4, 5))
    unsigned = [[level + form.zero_point for level in form.levels] for form in (four, five)]
    vectors = (
        _words([0x0F] * 16), _words(unsigned[0]), _words(unsigned[1][:16]), _words(unsigned[1][16:]),
        [SCALE_BITS] * 8, [WHOLE_SCALES] * 8,
    )  # fmt: skip
    words = ", ".join(f"i32 {word}" for vector in vectors for word in vector)
    return f"@q35c_narrow_constants = linkonce_odr hidden constant {_CONSTANTS_TYPE} [{words}], align 64"
