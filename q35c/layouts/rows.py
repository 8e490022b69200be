"""How rounded rows of activations lie in the arena.

int8-sums         codes, scales and sums in int32 words: `IntegerRow`
int8-sums-starts  the same with starts behind them
bf16-pairs        two values in a word
bf16-words        each value in a word, as f32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from q35c.formats.integer import SUM_INPUTS
from q35c.formats.registry import integer_format
from q35c.layouts.weights import LINE_WORDS, ceil_div

RowLayout = Literal["int8-sums", "int8-sums-starts", "bf16-pairs", "bf16-words"]

SUM_FACTOR = -32  # the zero point of 4- and 5-bit weights; that of 8-bit ones is four times as much


@dataclass(frozen=True)
class IntegerRow:
    """Lay out a rounded row of K values in int32 words.

    Its codes, four in a word and zero behind the last value, then the f32 bits of its scales, then its sums, SUM_FACTOR times
    that of each group's codes; with `has_starts` a word for 32 values behind them: two such sums modulo 2^16, of the
    first and of the second two of every 4 values.
    """

    K: int
    group: int
    has_starts: bool

    @property
    def groups(self) -> int:
        return ceil_div(self.K, self.group)

    @property
    def starts_in_group(self) -> int:
        return self.group // SUM_INPUTS if self.has_starts else 0

    @property
    def scales(self) -> int:
        """Word of the first scale."""
        return self.groups * self.group // 4

    @property
    def sums(self) -> int:
        """Word of the first sum."""
        return self.scales + self.groups

    @property
    def starts(self) -> int:
        """Word of the first start."""
        return self.sums + self.groups

    @property
    def used_words(self) -> int:
        return self.starts + self.groups * self.starts_in_group

    @property
    def words(self) -> int:
        """Words of a row, a whole number of cache lines."""
        return ceil_div(self.used_words, LINE_WORDS) * LINE_WORDS


def bf16_row_words(K: int, is_paired: bool) -> int:
    """Return the 4-byte words from one row of K values rounded to bf16 to the next: two values in a word, or kept in f32.

    Rows begin at an odd number of cache lines from each other: many rows that a tile reads side by side then spread
    over all sets of a cache.
    """
    words = ceil_div(K, 2) if is_paired else K
    return (ceil_div(words, LINE_WORDS) | 1) * LINE_WORDS


def row_words(layout: RowLayout, dtype: str, K: int) -> int | None:
    """Return the 4-byte words of a row of K values rounded to a dtype, None where the layout holds no such rows."""
    if form := integer_format(dtype):
        has_starts = layout == "int8-sums-starts"
        is_known = dtype.startswith("q") and layout.startswith("int8")
        return IntegerRow(K, form.group, has_starts).words if is_known else None
    is_known = dtype == "bf16" and layout.startswith("bf16")
    return bf16_row_words(K, layout == "bf16-pairs") if is_known else None
