"""Embedding lookup from the packed layout, so that a tied output head shares its storage.

    y[t, h] = W[token t, h]        is_mixed: X[t, h] where token t is negative

Row v lies in block v // 32, lane v % 32: its elements are 128 bytes apart, one cache line each.
That line traffic is the limit. Threads split (token, chunk of columns) pairs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.calls import Cost
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.family import F32_BYTES, Family, Parameters
from q35c.codegen.cpu.kernels.products.choose import make_product
from q35c.codegen.cpu.kernels.products.integer_tile import IntegerProduct
from q35c.codegen.cpu.kernels.products.integer_weights import scale_of
from q35c.codegen.cpu.kernels.products.product import Product
from q35c.codegen.cpu.kernels.vectors import Expr, share, widen_high, widen_low
from q35c.formats.integer import IntegerFormat
from q35c.layouts.weights import BLOCK, ceil_div

_CHUNK = 128  # columns of one work item: whole groups of integers, whole pairs of bf16

Word = Callable[[Expr], Expr]  # element of the token's block -> its value


def embedding(V: int, H: int, dtype: str, isa: Isa, is_mixed: bool = False) -> PrimFunc:
    """Make the kernel (W, IDS i32 [T], Y f32 [T, H], T, ld_y, tid, nt) for a table of V rows.

    W is packed as `linear` reads it. Ids outside the table read its first or last row; if `is_mixed`, negative ones
    a row of ROWS f32 [T, H], which stands behind IDS.
    """
    table = make_product(V, H, dtype, "none", isa)
    chunks = ceil_div(H, _CHUNK)

    @T.prim_func(private=True, s_tir=True)
    def embedding_kernel(
        W: T.handle(table.element),
        IDS: T.handle("int32"),
        Y: T.handle("float32"),
        tokens: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        w = table.weights(W)
        ids = T.decl_buffer((tokens,), "int32", data=IDS)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        first: T.let[T.int64] = share(tokens * chunks, tid, nt)
        last: T.let[T.int64] = share(tokens * chunks, tid + 1, nt)
        for item in T.serial(last - first):
            row: T.let[T.int64] = T.truncdiv(first + item, chunks)
            begin: T.let[T.int64] = T.truncmod(first + item, chunks) * _CHUNK
            token: T.let[T.int64] = T.cast(T.max(T.min(ids[row], V - 1), 0), "int64")
            block: T.let[T.int64] = T.shift_right(token, T.int64(5))
            lane: T.let[T.int64] = T.bitwise_and(token, T.int64(BLOCK - 1))
            end: T.let[T.int64] = T.min(begin + _CHUNK, T.int64(H))
            copy_columns(table, words_of(w, block), lane, y, row, begin, end)
        return T.int32(0)

    @T.prim_func(private=True, s_tir=True)
    def mixed_embedding_kernel(
        W: T.handle(table.element),
        IDS: T.handle("int32"),
        ROWS: T.handle("float32"),
        Y: T.handle("float32"),
        tokens: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        w = table.weights(W)
        ids = T.decl_buffer((tokens,), "int32", data=IDS)
        rows = T.decl_buffer((tokens, H), "float32", data=ROWS)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        first: T.let[T.int64] = share(tokens * chunks, tid, nt)
        last: T.let[T.int64] = share(tokens * chunks, tid + 1, nt)
        for item in T.serial(last - first):
            row: T.let[T.int64] = T.truncdiv(first + item, chunks)
            begin: T.let[T.int64] = T.truncmod(first + item, chunks) * _CHUNK
            token: T.let[T.int64] = T.cast(T.min(ids[row], V - 1), "int64")
            end: T.let[T.int64] = T.min(begin + _CHUNK, T.int64(H))
            if token < 0:
                for c in T.serial(end - begin):
                    y[row, begin + c] = rows[row, begin + c]
            else:
                block: T.let[T.int64] = T.shift_right(token, T.int64(5))
                lane: T.let[T.int64] = T.bitwise_and(token, T.int64(BLOCK - 1))
                copy_columns(table, words_of(w, block), lane, y, row, begin, end)
        return T.int32(0)

    return mixed_embedding_kernel if is_mixed else embedding_kernel


def words_of(w: Expr, block: Expr) -> Word:
    """Return the function from an element's place in a block to the element."""
    return lambda at: w[block, at]


def copy_columns(
    table: Product, word: Word, lane: Expr, y: Expr, row: Expr, begin: Expr, end: Expr
) -> None:
    """Emit y[row, begin..end] = the lane's values; call it as a statement inside TVMScript."""
    if isinstance(table, IntegerProduct):
        _copy_integers(table, word, lane, y, row, begin, end)
    elif table.dtype == "f32":
        with T.serial(end - begin) as c:
            T.buffer_store(y, word((begin + c) * BLOCK + lane), [row, begin + c])
    else:
        _copy_pairs(word, lane, y, row, begin, end)


def _copy_pairs(word: Word, lane: Expr, y: Expr, row: Expr, begin: Expr, end: Expr) -> None:
    with T.serial(T.truncdiv(end - begin + 1, T.int64(2))) as pair:
        column = T.Bind(begin + pair * 2)
        both = T.Bind(word(T.truncdiv(begin, T.int64(2)) * BLOCK + pair * BLOCK + lane))
        T.buffer_store(y, widen_low(both, 1), [row, column])
        with T.If(column + 1 < end), T.Then():
            T.buffer_store(y, widen_high(both, 1), [row, column + 1])


def _copy_integers(
    table: IntegerProduct, word: Word, lane: Expr, y: Expr, row: Expr, begin: Expr, end: Expr
) -> None:
    """Emit the columns one by one: level * scale."""
    form, layout = table.form, table.layout
    exponent = T.Bind(_byte_of(word, T.int64(0), lane))
    with T.serial(end - begin) as c:
        column = T.Bind(begin + c)
        group = T.Bind(T.truncdiv(column, T.int64(form.group)))
        within = T.Bind(T.cast(column - group * form.group, "int32"))
        number = T.shift_right(within, layout.form.set_inputs.bit_length() - 1)
        lines = T.Bind(layout.set_start(group, number) + lane)
        code = T.cast(T.cast(_byte_of(word, layout.scales_start(group), lane), "int8"), "int32")
        scale = T.Bind(scale_of(code, exponent, 1))
        # Of the inputs of a set, `part` counts words of 4 and `byte` the bits before a byte of a word.
        part = T.Bind(T.bitwise_and(T.shift_right(within, 2), layout.set_words - 1))
        byte = T.Bind(T.bitwise_and(within, 3) * 8)
        level = _level_of(form, _code_of(table, word, lines, part, byte))
        T.buffer_store(y, T.cast(level, "float32") * scale, [row, column])


def _byte_of(word: Word, start: Expr, lane: Expr) -> Expr:
    """Return an output's byte of a line that begins at word `start`."""
    within = T.cast(T.bitwise_and(lane, T.int64(3)), "int32") * 8
    return T.bitwise_and(T.shift_right(word(start + T.shift_right(lane, T.int64(2))), within), 255)


def _level_of(form: IntegerFormat, code: Expr) -> Expr:
    """Return the level of a code: looked up in constants of 8 levels each, or code less zero point."""
    if form.is_even:
        return code - form.zero_point
    code, found = T.Bind(T.cast(code, "int64")), None
    for first in range(0, len(form.levels), 8):
        eight = int.from_bytes(
            struct.pack("8b", *form.levels[first : first + 8]), "little", signed=True
        )
        part = T.int64(eight)
        found = part if found is None else T.Select(code < first, found, part)
    shift = T.bitwise_and(code, T.int64(7)) * 8
    return T.cast(T.cast(T.shift_right(found, shift), "int8"), "int32")


def _code_of(table: IntegerProduct, word: Word, lines: Expr, part: Expr, byte: Expr) -> Expr:
    """Return one stored code; `pack_words` says where its bits lie."""
    bits = table.form.bits
    if bits == 8:
        return T.bitwise_and(T.shift_right(word(lines + part * BLOCK), byte), 255)
    shift = byte + T.bitwise_and(part, 1) * 4
    first = 1 if bits == 5 else 0
    halves = word(lines + (first + T.shift_right(part, 1)) * BLOCK)
    low = T.bitwise_and(T.shift_right(halves, shift), 15)
    if bits == 4:
        return low
    high = T.bitwise_and(T.shift_right(word(lines), byte + part), 1)
    return low + high * 16


def _cost(p: Parameters) -> Cost:
    return Cost(
        weight_share=1 / p["V"],
        cached_bytes_per_token=p["H"] * F32_BYTES,
        operations_per_token=p["H"],
    )


def _arguments(p: Parameters) -> str:
    return f"w ids {'rows ' if p.get('is_mixed') else ''}y tokens ld_y"


EMBEDDING = Family(embedding, _arguments, writes="y", cost=_cost)
