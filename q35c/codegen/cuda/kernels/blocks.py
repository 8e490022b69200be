"""How kernels read packed weights (layouts/weights.py): in blocks of 32 rows, lane n of a warp reads row n of a block.

One load of a warp is then 128 bytes side by side, in every format, and nothing is shuffled: each lane adds up its own row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from q35c.codegen.cuda.kernels.family import ceil_div
from q35c.codegen.cuda.kernels.make import Expr, T, add, let, local, store
from q35c.codegen.cuda.kernels.threads import extern, f32_of, high_bf16, low_bf16, when
from q35c.formats.integer import IntegerFormat
from q35c.formats.registry import integer_format
from q35c.layouts.rows import IntegerRow
from q35c.layouts.weights import BLOCK, IntegerBlock

FLOAT_INPUTS = 16  # of a row of floats, multiplied at a time
_SIGNS = 0x80808080


class Line:
    """A line of an array of two axes, indexed by its words alone."""

    def __init__(self, words: Expr, line: Expr) -> None:
        self._words, self._line = words, line

    def __getitem__(self, word: Expr) -> Expr:
        return self._words[self._line, word]


def weight_type(dtype: str) -> str:
    """Return the type of the words in which a kernel reads weights of a format."""
    return "float32" if dtype == "f32" else "uint32"


def block_words(dtype: str, K: int) -> int:
    """Return the words of a block of 32 rows."""
    if form := integer_format(dtype):
        return IntegerBlock(form, K).block_words
    return BLOCK * (K if dtype == "f32" else ceil_div(K, 2))


def row_type(rows: str) -> str:
    """Return the type of the words in which a kernel reads rows of activations."""
    return "float32" if rows == "f32" else "uint32"


def units(dtype: str, K: int) -> int:
    """Return how many parts a row's inputs have that warps may take one by one."""
    form = integer_format(dtype)
    return form.groups(K) if form else ceil_div(K, FLOAT_INPUTS)


def multiply(
    K: int, dtype: str, rows: str, w: Expr, base: Expr, lane: Expr, unit: Expr, x: Callable[[int, Expr], Expr], acc: Expr, tile: int
) -> None:  # fmt: skip
    """Add to acc[r], for r below `tile`, the product of a part of the block's row `lane` with that part of a row of activations.

    `base` is the block's first word in `w`; x(r, word) is a word of the activations' row r.
    """
    if form := integer_format(dtype):
        _multiply_integers(form, K, w, base, lane, unit, x, acc, tile)
    else:
        _multiply_floats(K, dtype, rows, w, base, lane, unit, x, acc, tile)


def _multiply_floats(K, dtype, rows, w, base, lane, unit, x, acc, tile) -> None:  # type: ignore[no-untyped-def]
    with T.serial(FLOAT_INPUTS // 2) as pair:
        k = let("k", unit * FLOAT_INPUTS + pair * 2)
        if K % FLOAT_INPUTS == 0:
            _add_pair(K, dtype, rows, w, base, lane, k, x, acc, tile)
        else:
            with when(k < K):
                _add_pair(K, dtype, rows, w, base, lane, k, x, acc, tile)


def _add_pair(K, dtype, rows, w, base, lane, k, x, acc, tile) -> None:  # type: ignore[no-untyped-def]
    """Add the products of inputs k and k + 1, the latter if it is there."""
    after = k + 1 if K % 2 == 0 else T.min(k + 1, K - 1)
    if dtype == "f32":
        first = let("first", w[base + k * BLOCK + lane])
        second = let("second", w[base + after * BLOCK + lane])
    else:
        word = let("word", w[base + (k >> 1) * BLOCK + lane])
        first, second = let("first", low_bf16(word)), let("second", high_bf16(word))
    if K % 2:
        second = let("second", T.Select(k + 1 < K, second, T.float32(0)))
    for r in range(tile):
        if rows == "bf16":
            pair = let("pair", x(r, k >> 1))
            low, high = low_bf16(pair), high_bf16(pair)
        else:
            low, high = x(r, k), x(r, after)
        add(acc, first * low, r)
        add(acc, second * high, r)


def _multiply_integers(form, K, w, base, lane, group, x, acc, tile) -> None:  # type: ignore[no-untyped-def]
    row = IntegerRow(K, form.group, has_starts=False)
    sums = local("sums", (tile,), "int32")
    for r in range(tile):
        store(sums, T.int32(0), r)
    with T.serial(IntegerBlock(form, K).sets) as number:
        for word, value in enumerate(set_levels(form, K, w, base, lane, group, number)):
            levels = let("levels", value)
            at = group * (form.group // 4) + number * (form.set_inputs // 4) + word
            for r in range(tile):
                codes = T.cast(x(r, at), "int32")
                store(sums, extern("int32", "__dp4a", levels, codes, sums[r]), r)
    scale = let("scale", weight_scale(form, K, w, base, lane, group))
    for r in range(tile):
        product = scale * f32_of(x(r, row.scales + group))
        add(acc, T.cast(sums[r], "float32") * product, r)


def set_levels(
    form: IntegerFormat, K: int, w: Expr, base: Expr, lane: Expr, group: Expr, number: Expr
) -> Iterator[Expr]:
    """Yield the levels of each 4 inputs of a set, as the bytes of an int32; each word that stores them is loaded once."""
    start = let("start", base + IntegerBlock(form, K).set_start(group, number) + lane)
    if form.bits == 8:
        for word in range(form.set_inputs // 4):
            yield T.cast(T.bitwise_xor(w[start + word * BLOCK], T.uint32(_SIGNS)), "int32")
        return
    fifth = let("fifth", w[start]) if form.bits == 5 else None
    for line in range(form.set_inputs // 8):
        codes = let("codes", w[start + (line + (form.bits == 5)) * BLOCK])
        for half in range(2):
            yield _levels(codes, half, fifth, line * 2 + half)


def level_word(
    form: IntegerFormat, K: int, w: Expr, base: Expr, lane: Expr, group: Expr, number: Expr, word: Expr
) -> Expr:  # fmt: skip
    """Return the levels of 4 inputs, word `word` of a set, as the bytes of an int32."""
    start = base + IntegerBlock(form, K).set_start(group, number) + lane
    if form.bits == 8:
        return T.cast(T.bitwise_xor(w[start + word * BLOCK], T.uint32(_SIGNS)), "int32")
    codes = w[start + (word // 2 + (form.bits == 5)) * BLOCK]
    return _levels(codes, word % 2, w[start] if form.bits == 5 else None, word)


def _levels(codes: Expr, half: Expr, fifth: Expr, word: Expr) -> Expr:
    """Return the levels of one half of a word of codes; `fifth` holds the fifth bits of a set."""
    if fifth is None:
        return extern("int32", "q35c_levels4", codes, T.cast(half, "int32"))
    half, word = T.cast(half, "int32"), T.cast(word, "int32")
    return extern("int32", "q35c_levels5", codes, fifth, half, word)


def weight_scale(form: IntegerFormat, K: int, w: Expr, base: Expr, lane: Expr, group: Expr) -> Expr:
    """Return the f32 scale of a group of the block's row `lane` (formats/integer.py: scale_values)."""
    scales = base + IntegerBlock(form, K).scales_start(group)
    code = let("code", _byte(w[scales + (lane >> 2)], lane))
    exponent = _byte(w[base + (lane >> 2)], lane)
    steps = T.bitwise_and(code, T.uint32(127)) + T.shift_left(exponent, T.uint32(4))
    sign = T.shift_left(T.shift_right(code, T.uint32(7)), T.uint32(31))
    return f32_of(T.bitwise_or(T.shift_left(steps, T.uint32(19)), sign))


def _byte(word: Expr, lane: Expr) -> Expr:
    """Return the byte of a word that belongs to a lane, uint32."""
    shift = T.cast((lane & 3) * 8, "uint32")
    return T.bitwise_and(T.shift_right(word, shift), T.uint32(255))
