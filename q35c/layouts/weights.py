"""How packed weights lie in the file.

    layout          what it is                 in the file
    vector          any shape                  as in the checkpoint
    conv            [C, taps]                  [taps, C]
    linear          [N, K]                     [blocks of 32 rows, block]
    swiglu          gate over up, [2 I, K]     [blocks of 16 rows of gate and 16 of up, block]
    experts         [E, N, K]                  for each expert as linear
    experts_swiglu  [E, 2 I, K]                for each expert as swiglu

Matrices are stored in blocks of 32 output rows so that one vector load serves 8, 16 or 32 outputs of
one input element: f32 as [blocks, K, 32], bf16 in pairs of inputs as [blocks, K/2, 32, 2]. Integers are
stored as [blocks, bytes]: a cache line with the 32 rows' exponents, then, for each two groups of inputs, a cache line
with their 32 scales and lines of a 4-byte word for each of the 32 outputs. 16 inputs take 4 lines of 8 bits or 2
lines of 4 bits; of 5 bits a line with the high bits of 32 inputs comes first, then the low 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from q35c.formats.integer import IntegerFormat
from q35c.formats.registry import integer_format

BLOCK = 32  # output rows in one block, whatever the precision and the instruction set
CACHE_LINE = 64  # bytes
LINE_WORDS = CACHE_LINE // 4
SCALE_WORDS = BLOCK // 4  # a byte for each output

WeightLayout = Literal["vector", "conv", "linear", "swiglu", "experts", "experts_swiglu"]
_RANKS: dict[WeightLayout, int] = {  # of what a layout takes; a vector may be anything
    "conv": 2,
    "linear": 2,
    "swiglu": 2,
    "experts": 3,
    "experts_swiglu": 3,
}
Index = Any  # a number, or an expression in a kernel


def ceil_div(value: int, divisor: int) -> int:
    """Divide integers, rounding up."""
    return -(-value // divisor)


def block_shape(dtype: str, inputs: int) -> tuple[int, ...]:
    """Return the shape of a block of rows of `inputs` values."""
    if form := integer_format(dtype):
        return (IntegerBlock(form, inputs).block_bytes,)
    return (inputs, BLOCK) if dtype == "f32" else (ceil_div(inputs, 2), BLOCK, 2)


def packed_shape(
    layout: WeightLayout, form: str, shape: Sequence[int]
) -> tuple[str, tuple[int, ...]] | None:
    """Return dtype and shape in the file of a weight that has this shape, in a format; None where a layout holds no such one."""
    is_float = form in ("f32", "bf16")
    if layout == "vector":
        return (form, tuple(shape)) if is_float else None
    is_integer = form.startswith("i") and integer_format(form) is not None
    if len(shape) != _RANKS[layout] or not (is_float or is_integer):
        return None
    *experts, rows, inputs = shape
    if layout == "conv":
        return (form, (inputs, rows)) if is_float else None
    if layout.endswith("swiglu") and rows % 2:
        return None
    blocks = block_count(layout, rows)
    return "u8" if is_integer else form, (*experts, blocks, *block_shape(form, inputs))


def block_count(layout: WeightLayout, rows: int) -> int:
    """Return the blocks of a matrix of so many rows; of a swiglu both halves begin a block."""
    if layout.endswith("swiglu"):
        return ceil_div(rows // 2, BLOCK // 2)
    return ceil_div(rows, BLOCK)


@dataclass(frozen=True)
class IntegerBlock:
    """Say where the scales and sets of each group of K inputs lie in a block, in words."""

    form: IntegerFormat
    K: int

    @property
    def set_words(self) -> int:
        """Number of words of a row that a set of inputs meets."""
        return self.form.set_inputs // 4

    @property
    def set_lines(self) -> int:
        """Number of lines that store a set of inputs."""
        return self.form.bits * self.set_words // 8

    @property
    def sets(self) -> int:
        """Number of sets of one group."""
        return self.form.group // self.form.set_inputs

    @property
    def group_words(self) -> int:
        """Words of the codes of a group."""
        return self.sets * self.set_lines * BLOCK

    @property
    def block_words(self) -> int:
        groups = self.form.groups(self.K)
        return LINE_WORDS * (1 + ceil_div(groups, 2)) + groups * self.group_words

    @property
    def block_bytes(self) -> int:
        return 4 * self.block_words

    def pair_start(self, group: Index) -> Index:
        """Return where the pair that a group belongs to begins: with the scales of both."""
        return LINE_WORDS + (group >> 1) * (LINE_WORDS + 2 * self.group_words)

    def scales_start(self, group: Index) -> Index:
        return self.pair_start(group) + (group & 1) * SCALE_WORDS

    def set_start(self, group: Index, number: Index) -> Index:
        first = LINE_WORDS + (group & 1) * self.group_words
        return self.pair_start(group) + first + number * (self.set_lines * BLOCK)
