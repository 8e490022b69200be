"""Round and pack the rows of a matrix to integers: what `pack.pack_integers` defines, some hundred times faster.

For each group of a row the scales that `integer.TOP_SHARES` names are tried and the one with the least squared
error is taken; then 32 rows' codes are written as lines of words. Bound by the arithmetic of the trials: about six
vector instructions for 16 values and scale. It runs while compiling, not in an artifact.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.products.integer_tile import IntegerProduct
from q35c.codegen.cpu.kernels.products.integer_weights import scale_of
from q35c.codegen.cpu.kernels.vectors import (
    STACK,
    Expr,
    bits,
    from_bits,
    hsum,
    ramp,
    share,
    splat,
    splat_int,
)
from q35c.formats.integer import (
    LARGEST_SUM,
    LAST_SHARES,
    LEAST_MEASURED,
    SUM_INPUTS,
    TOP_SHARES,
    scale_bound,
)
from q35c.layouts.weights import BLOCK

_ROUND = (
    12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the mantissa
)
_ROUND_BITS = 0x4B400000


@functools.cache
def pack_integers(K: int, dtype: str, isa: Isa) -> PrimFunc:
    """Make the kernel (X f32 [blocks * 32, K], W i32, BYTES u8, blocks, tid, nt).

    W and BYTES are one address, the packed blocks. Threads split the blocks.
    """
    product = IntegerProduct(BLOCK, K, dtype, "none", isa)
    groups, group = product.form.groups(K), product.form.group

    @T.prim_func(private=True, s_tir=True)
    def pack_integers_kernel(
        X: T.handle("float32"),
        W: T.handle("int32"),
        BYTES: T.handle("uint8"),
        blocks: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        # No noalias: W and BYTES are one.
        x = T.decl_buffer((blocks * BLOCK, K), "float32", data=X)
        w = T.decl_buffer((blocks, product.block_elements), "int32", data=W)
        octets = T.decl_buffer((blocks, product.block_elements * 4), "uint8", data=BYTES)
        values = T.alloc_buffer((group,), "float32", annotations=STACK)
        words = T.alloc_buffer((BLOCK, group // 4), "int32", annotations=STACK)
        exponents = T.alloc_buffer((BLOCK,), "int32", annotations=STACK)
        least = T.alloc_buffer((1,), "float32")
        best = T.alloc_buffer((1,), "int32")  # the scale of the least error
        first: T.let[T.int64] = share(blocks, tid, nt)
        last: T.let[T.int64] = share(blocks, tid + 1, nt)
        for item in T.serial(last - first):
            for word in T.serial(product.layout.block_words):
                w[first + item, word] = T.int32(0)
            for row in T.serial(T.int64(BLOCK)):
                choose_exponent(product, x, (first + item) * BLOCK + row, exponents, row)
                octets[first + item, row] = T.cast(exponents[row], "uint8")
            for number in T.serial(T.int64(groups)):
                for row in T.serial(T.int64(BLOCK)):
                    load_values(product, x, (first + item) * BLOCK + row, number, values)
                    choose_scale(product, values, exponents[row], least, best)
                    octets[first + item, product.layout.scales_start(number) * 4 + row] = T.cast(
                        best[0], "uint8"
                    )
                    write_codes(product, values, _scale(best[0], exponents[row]), words, row)
                for at in T.serial(T.int64(product.layout.sets)):
                    for row in T.serial(T.int64(BLOCK)):
                        write_words(product, words, number, at, row, w, first + item)
        return T.int32(0)

    return pack_integers_kernel


def load_values(product: IntegerProduct, x: Expr, row: Expr, number: Expr, values: Expr) -> None:
    """Emit values = one group of a row, zero behind its end. A statement inside TVMScript, as all below."""
    L, group, rest = product.isa.lanes, product.form.group, product.K % product.form.group

    def copy_whole() -> None:
        for v in range(0, group, L):
            T.buffer_store(values, x[row, ramp(number * group + v, L)], [ramp(v, L)])

    if not rest:
        copy_whole()
        return
    with T.If(number < product.form.groups(product.K) - 1):
        with T.Then():
            copy_whole()
        with T.Else():
            for v in range(0, group, L):
                T.buffer_store(values, splat(0.0, L), [ramp(v, L)])
            with T.serial(rest) as k:
                T.buffer_store(values, x[row, number * group + k], [k])


def choose_exponent(
    product: IntegerProduct, x: Expr, row: Expr, exponents: Expr, place: Expr
) -> None:
    """Emit exponents[place] = that of the least scale of a row; what is not finite does not count."""
    largest = T.alloc_buffer((1,), "int32")
    T.buffer_store(largest, T.int32(0), [0])
    with T.serial(product.K) as k:
        magnitude = T.Bind(T.bitwise_and(bits(x[row, k], 1), 0x7FFFFFFF))
        finite = T.Select(magnitude < 0x7F800000, magnitude, 0)
        T.buffer_store(largest, T.max(largest[0], finite), [0])
    bound = bits(from_bits(largest[0], 1) * T.float32(scale_bound(product.form)), 1)
    exponent = T.shift_right(bound, 23) - 7
    T.buffer_store(exponents, T.max(T.min(exponent, 247), 1), [place])


def choose_scale(
    product: IntegerProduct, values: Expr, exponent: Expr, least: Expr, best: Expr
) -> None:
    """Emit best = the code of the scale with the least squared error, the row's exponent given."""
    L, form = product.isa.lanes, product.form
    extremes = T.alloc_buffer((2, L), "float32")
    high, low = (extremes[i, ramp(0, L)] for i in range(2))
    for i in range(2):
        T.buffer_store(extremes, values[ramp(0, L)], [i, ramp(0, L)])
    with T.serial(form.group // L) as v:
        at = values[ramp(v * L, L)]
        T.buffer_store(extremes, T.max(high, at), [0, ramp(0, L)])
        T.buffer_store(extremes, T.min(low, at), [1, ramp(0, L)])
    largest, smallest = T.Bind(_reduce("fmax", high)), T.Bind(_reduce("fmin", low))
    top = T.Bind(T.Select(largest >= T.float32(0) - smallest, largest, smallest))
    # A denormal one counts as 0, and so has no sign.
    top = T.Bind(T.Select(T.fabs(top) < T.float32(2.0**-126), T.float32(0), top))
    T.buffer_store(least, T.float32(float("inf")), [0])
    T.buffer_store(best, T.int32(0), [0])
    shares = TOP_SHARES[form.bits] + LAST_SHARES[form.bits]
    table = T.alloc_buffer((len(shares),), "float32", annotations=STACK)
    for number, part in enumerate(shares):
        T.buffer_store(table, T.float32(1 / (part * form.zero_point)), [number])
    # Loops, not code for each share and vector: that took LLVM half a minute.
    with T.serial(len(shares)) as trial:
        is_due = least[0] == T.float32(float("inf"))  # the last ones: where none has kept its sums
        with T.If(tirx.Or(trial < len(TOP_SHARES[form.bits]), is_due)), T.Then():
            code = T.Bind(_nearest_code(top * table[trial], exponent))
            _try_scale(product, values, code, exponent, least, best)


def _try_scale(
    product: IntegerProduct, values: Expr, code: Expr, exponent: Expr, least: Expr, best: Expr
) -> None:
    """Emit best = a code, if its scale has the least error so far and keeps to LARGEST_SUM."""
    L, form = product.isa.lanes, product.form
    scale = T.Bind(_scale(code, exponent))
    inverse, wide = T.Bind(splat(T.float32(1) / scale, L)), T.Bind(splat(scale, L))
    total = T.alloc_buffer((2, L), "float32")  # squared errors; magnitudes of 32 inputs' levels
    largest = T.alloc_buffer((1,), "float32")
    errors, magnitudes = (total[i, ramp(0, L)] for i in range(2))
    T.buffer_store(total, splat(0.0, L), [0, ramp(0, L)])
    T.buffer_store(largest, T.float32(0), [0])
    with T.serial(form.group // SUM_INPUTS) as part:
        T.buffer_store(total, splat(0.0, L), [1, ramp(0, L)])
        with T.serial(SUM_INPUTS // L) as v:
            x = T.Bind(values[ramp(part * SUM_INPUTS + v * L, L)])
            level = T.Bind(_level(product, x, inverse))
            error = T.Bind(x - level * wide)
            T.buffer_store(total, errors + error * error, [0, ramp(0, L)])
            if form.bits != 8:
                T.buffer_store(total, magnitudes + T.fabs(level), [1, ramp(0, L)])
        if form.bits != 8:
            for pair in range(2):
                one = _sum_of_pairs(magnitudes, pair, L)
                T.buffer_store(largest, T.max(largest[0], one), [0])
    is_measured = exponent >= LEAST_MEASURED
    whole = T.Bind(T.Select(is_measured, hsum(errors, L), T.float32(0)))
    keeps = largest[0] <= T.float32(LARGEST_SUM)  # of 8 bits nothing was added up
    with T.If(tirx.And(whole < least[0], keeps)), T.Then():
        T.buffer_store(least, whole, [0])
        T.buffer_store(best, code, [0])


def _sum_of_pairs(sums: Expr, pair: int, lanes: int) -> Expr:
    """Return the sum of the lanes of the first, or the second, two of every 4."""
    kept = [T.float32(lane % 4 // 2 == pair) for lane in range(lanes)]
    return hsum(sums * tirx.Shuffle(kept, [T.int32(lane) for lane in range(lanes)]), lanes)


def write_codes(product: IntegerProduct, values: Expr, scale: Expr, words: Expr, row: Expr) -> None:
    """Emit the unsigned codes of a group, four to a word, in natural order."""
    L, form = product.isa.lanes, product.form
    inverse = T.Bind(splat(T.float32(1) / scale, L))
    codes = T.alloc_buffer((form.group,), "int32", annotations=STACK)
    with T.serial(form.group // L) as v:
        code = _code(product, values[ramp(v * L, L)], inverse)
        T.buffer_store(codes, code, [ramp(v * L, L)])
    with T.serial(form.group // 4) as word:
        four = [codes[word * 4 + byte] << T.int32(8 * byte) for byte in range(4)]
        T.buffer_store(words, four[0] | four[1] | four[2] | four[3], [row, word])


def write_words(
    product: IntegerProduct, words: Expr, group: Expr, at: Expr, row: Expr, w: Expr, block: Expr
) -> None:
    """Emit the stored words of a set of one output's codes; `pack.pack_words` defines them."""
    count = product.layout.set_words
    whole = [T.Bind(words[row, at * count + part]) for part in range(count)]
    if product.form.bits == 8:
        stored: list[Expr] = whole
    else:
        low = [word & T.int32(0x0F0F0F0F) for word in whole]
        stored = [low[p] | low[p + 1] << T.int32(4) for p in range(0, count, 2)]
    if product.form.bits == 5:
        high = [
            ((word >> T.int32(4)) & T.int32(0x01010101)) << T.int32(part)
            for part, word in enumerate(whole)
        ]
        stored.insert(0, functools.reduce(lambda a, b: a | b, high))
    start = T.Bind(product.layout.set_start(group, at) + row)
    for line, word in enumerate(stored):
        T.buffer_store(w, word, [block, start + line * BLOCK])


def _level(product: IntegerProduct, x: Expr, inverse: Expr) -> Expr:
    """Return the nearest levels of a vector, as f32."""
    L, form = product.isa.lanes, product.form
    if not form.is_even:
        return _by_thresholds(
            product, x, inverse, [splat(float(level), L) for level in form.levels]
        )
    level = _code(product, x, inverse) - splat_int(form.zero_point, L)
    return T.cast(level, f"float32x{L}")


def _code(product: IntegerProduct, x: Expr, inverse: Expr) -> Expr:
    """Return the codes of the nearest levels of a vector."""
    L, form = product.isa.lanes, product.form
    if not form.is_even:
        codes = [splat_int(code, L) for code in range(len(form.levels))]
        return _by_thresholds(product, x, inverse, codes)
    low, high = (splat(float(level), L) for level in (form.levels[0], form.levels[-1]))
    limited = T.max(T.min(x * inverse, high), low)
    rounded = bits(limited + splat(_ROUND, L), L) - splat_int(_ROUND_BITS, L)
    return rounded + splat_int(form.zero_point, L)


def _by_thresholds(
    product: IntegerProduct, x: Expr, inverse: Expr, choices: Sequence[Expr]
) -> Expr:
    """Return in every lane the choice that belongs to the nearest level."""
    scaled, found = T.Bind(x * inverse), choices[0]
    for threshold, choice in zip(product.form.thresholds, choices[1:], strict=True):
        found = T.Select(scaled > splat(threshold, product.isa.lanes), choice, found)
    return found


def _nearest_code(wanted: Expr, exponent: Expr) -> Expr:
    """Return the code of the stored scale nearest to a scalar f32; `integer.scale_codes` defines it."""
    word = T.Bind(bits(wanted, 1))
    magnitude = T.Bind(T.bitwise_and(word, 0x7FFFFFFF))
    odd = T.bitwise_and(T.shift_right(magnitude, 19), 1)
    steps = T.shift_right(magnitude + 0x3FFFF + odd, 19) - exponent * 16
    sign = T.Select(word < 0, T.int32(128), T.int32(0))
    return T.bitwise_or(T.max(T.min(steps, 127), 0), sign)


def _scale(code: Expr, exponent: Expr) -> Expr:
    signed = T.cast(T.cast(code, "int8"), "int32")
    return scale_of(signed, exponent, 1)


def _reduce(operation: str, x: Expr) -> Expr:
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.vector.reduce.{operation}")
    return T.call_llvm_pure_intrin(intrinsic, x, dtype="float32")
