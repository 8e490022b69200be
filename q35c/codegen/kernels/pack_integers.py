"""Round and pack the rows of a matrix to integers: what `pack.pack_integers` defines, some hundred times faster.

For each group of a row the scales that `formats.TOP_SHARES` names are tried and the one with the least squared
error is taken; then 32 rows' codes are written as lines of words. Bound by the arithmetic of the trials: about six
vector instructions for 16 values and scale. It runs while compiling, not in an artifact.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.common import (
    BLOCK,
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
from q35c.codegen.kernels.quantized_tile import IntegerProduct
from q35c.ir.formats import TOP_SHARES

_ROUND = (
    12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the mantissa
)
_ROUND_BITS = 0x4B400000


def pack_integers(K: int, dtype: str, isa: Isa) -> PrimFunc:
    """Make the kernel (X f32 [blocks * 32, K], W i32, HALVES u16, blocks, tid, nt).

    W and HALVES are one address, the packed blocks. Threads split the blocks.
    """
    product = IntegerProduct(BLOCK, K, dtype, "none", isa)
    groups, group = product.form.groups(K), product.form.group

    @T.prim_func(private=True, s_tir=True)
    def pack_integers_kernel(
        X: T.handle("float32"),
        W: T.handle("int32"),
        HALVES: T.handle("uint16"),
        blocks: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        # No noalias: W and HALVES are one.
        x = T.decl_buffer((blocks * BLOCK, K), "float32", data=X)
        w = T.decl_buffer((blocks, product.block_elements), "int32", data=W)
        halves = T.decl_buffer((blocks, product.block_elements * 2), "uint16", data=HALVES)
        values = T.alloc_buffer((group,), "float32", annotations=STACK)
        words = T.alloc_buffer((BLOCK, group // 4), "int32", annotations=STACK)
        best = T.alloc_buffer((2,), "float32")  # the least error, its scale
        first: T.let[T.int64] = share(blocks, tid, nt)
        last: T.let[T.int64] = share(blocks, tid + 1, nt)
        for item in T.serial(last - first):
            for number in T.serial(T.int64(groups)):
                base: T.let[T.int64] = number * product.layout.group_words
                for row in T.serial(T.int64(BLOCK)):
                    load_values(product, x, (first + item) * BLOCK + row, number, values)
                    choose_scale(product, values, best)
                    # Word j of the scales: output j in its low half, j + 16 in its high half.
                    halves[
                        first + item,
                        base * 2 + T.bitwise_and(row, T.int64(15)) * 2 + T.shift_right(row, T.int64(4)),
                    ] = T.cast(T.shift_right(bits(best[1], 1), 16), "uint16")  # fmt: skip
                    write_codes(product, values, best[1], words, row)
                for at in T.serial(T.int64(product.layout.sets)):
                    for row in T.serial(T.int64(BLOCK)):
                        write_words(product, words, at, row, w, first + item, base)
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


def choose_scale(product: IntegerProduct, values: Expr, best: Expr) -> None:
    """Emit best = (error, scale) of the scale with the least squared error."""
    L, form = product.isa.lanes, product.form
    places = [ramp(v, L) for v in range(0, form.group, L)]
    high, low = values[places[0]], values[places[0]]
    for at in places[1:]:
        high, low = T.max(high, values[at]), T.min(low, values[at])
    high, low = T.Bind(_reduce("fmax", high)), T.Bind(_reduce("fmin", low))
    top = T.Bind(T.Select(high >= T.float32(0) - low, high, low))
    T.buffer_store(best, T.float32(float("inf")), [0])
    T.buffer_store(best, T.float32(0), [1])
    for part in TOP_SHARES[form.bits]:
        scale = T.Bind(_nearest_bf16(top * T.float32(1 / (part * form.zero_point))))
        inverse = T.Bind(splat(_inverse(scale), L))
        wide = T.Bind(splat(scale, L))
        total = T.alloc_buffer((1, L), "float32")
        T.buffer_store(total, splat(0.0, L), [0, ramp(0, L)])
        for at in places:
            level = _level(product, values[at], inverse)
            error = T.Bind(values[at] - level * wide)
            T.buffer_store(total, total[0, ramp(0, L)] + error * error, [0, ramp(0, L)])
        whole = T.Bind(hsum(total[0, ramp(0, L)], L))
        with T.If(whole < best[0]), T.Then():
            T.buffer_store(best, whole, [0])
            T.buffer_store(best, scale, [1])


def write_codes(product: IntegerProduct, values: Expr, scale: Expr, words: Expr, row: Expr) -> None:
    """Emit the unsigned codes of a group, four to a word, in natural order."""
    L, form = product.isa.lanes, product.form
    inverse = T.Bind(splat(_inverse(scale), L))
    codes = T.alloc_buffer((form.group,), "int32", annotations=STACK)
    for v in range(0, form.group, L):
        code = _code(product, values[ramp(v, L)], inverse)
        T.buffer_store(codes, code, [ramp(v, L)])
    with T.serial(form.group // 4) as word:
        four = [codes[word * 4 + byte] << T.int32(8 * byte) for byte in range(4)]
        T.buffer_store(words, four[0] | four[1] | four[2] | four[3], [row, word])


def write_words(
    product: IntegerProduct, words: Expr, at: Expr, row: Expr, w: Expr, block: Expr, base: Expr
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
        stored.append(functools.reduce(lambda a, b: a | b, high))
    start = T.Bind(base + BLOCK // 2 + at * (product.layout.set_lines * BLOCK) + row)
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


def _inverse(scale: Expr) -> Expr:
    return T.Select(scale == T.float32(0), T.float32(0), T.float32(1) / scale)


def _nearest_bf16(x: Expr) -> Expr:
    """Round a scalar f32 to bf16, nearest even."""
    word = T.Bind(bits(x, 1))
    odd = T.bitwise_and(T.shift_right(word, 16), 1)
    return from_bits(T.bitwise_and(word + 0x7FFF + odd, -65536), 1)


def _reduce(operation: str, x: Expr) -> Expr:
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.vector.reduce.{operation}")
    return T.call_llvm_pure_intrin(intrinsic, x, dtype="float32")
