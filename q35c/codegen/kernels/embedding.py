"""Embedding lookup from the packed layout, so that a tied output head shares its storage.

    y[t, h] = W[token t, h]

Row v lies in block v // 32, lane v % 32: its elements are 128 bytes apart, one cache line each.
That line traffic is the limit. Threads split (token, chunk of columns) pairs.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.common import BLOCK, ceil_div, share, widen_high, widen_low

_CHUNK = 64  # columns of one work item; even, so that no bf16 pair is split


def embedding(V: int, H: int, dtype: str, isa: Isa) -> PrimFunc:
    """Make the kernel (W, TOKENS i32 [T], Y f32 [T, H], T, ld_y, tid, nt) for a table of V rows.

    W is packed as f32 or bf16 pairs. Ids outside the table read its first or last row.
    """
    del isa  # strided loads: no vectors here
    return _from_f32(V, H) if dtype == "f32" else _from_bf16(V, H)


def _from_f32(V: int, H: int) -> PrimFunc:
    chunks = ceil_div(H, _CHUNK)

    @T.prim_func(private=True, s_tir=True)
    def embedding_kernel(
        W: T.handle("float32"),
        TOKENS: T.handle("int32"),
        Y: T.handle("float32"),
        tokens: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        w = T.decl_buffer((T.int64(ceil_div(V, BLOCK)), H, BLOCK), "float32", data=W)
        ids = T.decl_buffer((tokens,), "int32", data=TOKENS)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        first: T.let[T.int64] = share(tokens * chunks, tid, nt)
        last: T.let[T.int64] = share(tokens * chunks, tid + 1, nt)
        for item in T.serial(last - first):
            row: T.let[T.int64] = T.truncdiv(first + item, chunks)
            begin: T.let[T.int64] = T.truncmod(first + item, chunks) * _CHUNK
            token: T.let[T.int64] = T.cast(T.max(T.min(ids[row], V - 1), 0), "int64")
            block: T.let[T.int64] = T.shift_right(token, T.int64(5))
            lane: T.let[T.int64] = T.bitwise_and(token, T.int64(BLOCK - 1))
            for c in T.serial(T.min(T.int64(_CHUNK), H - begin)):
                y[row, begin + c] = w[block, begin + c, lane]
        return T.int32(0)

    return embedding_kernel


def _from_bf16(V: int, H: int) -> PrimFunc:
    chunks = ceil_div(H, _CHUNK)

    @T.prim_func(private=True, s_tir=True)
    def embedding_kernel(
        W: T.handle("int32"),
        TOKENS: T.handle("int32"),
        Y: T.handle("float32"),
        tokens: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        w = T.decl_buffer((T.int64(ceil_div(V, BLOCK)), ceil_div(H, 2), BLOCK), "int32", data=W)
        ids = T.decl_buffer((tokens,), "int32", data=TOKENS)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        first: T.let[T.int64] = share(tokens * chunks, tid, nt)
        last: T.let[T.int64] = share(tokens * chunks, tid + 1, nt)
        for item in T.serial(last - first):
            row: T.let[T.int64] = T.truncdiv(first + item, chunks)
            begin: T.let[T.int64] = T.truncmod(first + item, chunks) * (_CHUNK // 2)
            token: T.let[T.int64] = T.cast(T.max(T.min(ids[row], V - 1), 0), "int64")
            block: T.let[T.int64] = T.shift_right(token, T.int64(5))
            lane: T.let[T.int64] = T.bitwise_and(token, T.int64(BLOCK - 1))
            for pair in T.serial(T.min(T.int64(_CHUNK // 2), H // 2 - begin)):
                y[row, (begin + pair) * 2] = widen_low(w[block, begin + pair, lane], 1)
                y[row, (begin + pair) * 2 + 1] = widen_high(w[block, begin + pair, lane], 1)
            if H % 2 == 1 and begin + _CHUNK // 2 > H // 2:
                y[row, H - 1] = widen_low(w[block, H // 2, lane], 1)
        return T.int32(0)

    return embedding_kernel
