"""Probes: what this machine can do at most, measured by code of the artifact's own instruction set.

    read    bytes a second that a stream over memory reads
    cache   the same, from 256 KiB a thread that stay in its L2
    clock   nothing: the program's stamp puts the cycle counter into word 1 of DATA if word 0 is not 0
    int8    operations a second of the byte product, bf16 of the bf16 product, f32 of the fused multiply-add

They are ordinary private kernels (DATA, amount, tid, nt) behind programs of their own; `q35c.roofline` runs them with
DATA in the place of the state. A thread reads and scratches its own part of DATA, and leaves in words 256 and 257 of
that part (8 bytes each) the cycle counter before and after its work: threads that share nothing are each timed alone.
The products keep all operands in registers: each sum is also one of its own factors, so that nothing can be moved out
of the loop or computed once. Without VNNI the byte product is that of products/narrow_sums.py, and what scales its sums does not count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.calls import Call, Nt, Pointer, Tid, Tokens
from q35c.codegen.cpu.isa.apply import apply
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.vectors import STACK, Expr, ramp, splat_int, vector
from q35c.codegen.cpu.program import program_entry
from q35c.layouts.blobs import STAMP_BYTES

_PAGE_WORDS = 1024
_CACHED_PAGES = 64  # of a thread: a quarter of the L2 of today's cores, several times their L1
_STREAMS = 8  # vectors that are read before the first of them is added again


@dataclass(frozen=True, slots=True)
class Probe:
    """A kernel (the clock has none), and the bytes or operations of a thread for one unit of `amount`."""

    name: str
    kernel: PrimFunc | None
    work: int

    @property
    def symbol(self) -> str:
        return f"probe_{self.name}"

    def program(self) -> PrimFunc:
        """Return the public function that runs the kernel over the state's place."""
        data = Pointer("state", 0)
        if self.kernel is None:
            return program_entry(self.symbol, [], clock=data)
        return program_entry(self.symbol, [Call(self.symbol, (data, Tokens(), Tid(), Nt()))])

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return {"name": self.name, "symbol": self.symbol, "work": self.work}


@functools.cache
def probes(isa: Isa) -> tuple[Probe, ...]:
    """Return the probes of an instruction set; without bf16 products bf16 is computed as f32."""
    return tuple(_make_probes(isa))


def _make_probes(isa: Isa) -> Iterator[Probe]:
    yield Probe("clock", None, 1)
    yield Probe("read", reading(isa, is_cached=False), 4 * _PAGE_WORDS)
    yield Probe("cache", reading(isa, is_cached=True), 4 * _PAGE_WORDS * _CACHED_PAGES)
    one = isa.tuning.probe_sums * isa.lanes
    if isa.offers("dot4_u8s8") or isa.offers("add2_u8s8"):
        yield Probe("int8", multiplying(isa, add_bytes), 8 * one)
    if isa.offers("dot2_bf16"):
        yield Probe("bf16", multiplying(isa, add_pairs), 4 * one)
    yield Probe("f32", multiplying(isa, add_products), 2 * one)


def reading(isa: Isa, is_cached: bool) -> PrimFunc:
    """Make the kernel that reads `amount` pages of 4 KiB once, or 64 pages `amount` times."""
    L = isa.lanes
    turns = _PAGE_WORDS // (_STREAMS * L)

    @T.prim_func(private=True, s_tir=True)
    def probe_reading(
        DATA: T.handle("int32"), amount: T.int64, tid: T.int32, nt: T.int32
    ) -> T.int32:
        data = T.decl_buffer((T.int64(1) << 40,), "int32", data=DATA)
        pages: T.let[T.int64] = T.int64(_CACHED_PAGES) if is_cached else amount
        sweeps: T.let[T.int64] = amount if is_cached else T.int64(1)
        first: T.let[T.int64] = T.cast(tid, "int64") * pages * _PAGE_WORDS
        acc = T.alloc_buffer((_STREAMS, L), "int32", annotations=STACK)
        for j in T.unroll(_STREAMS):
            acc[j, ramp(0, L)] = splat_int(0, L)
        T.evaluate(stamp(DATA, first, 0))
        for _sweep in T.serial(sweeps):
            for turn in T.serial(pages * turns):
                for j in T.unroll(_STREAMS):
                    acc[j, ramp(0, L)] = (
                        acc[j, ramp(0, L)] + data[ramp(first + (turn * _STREAMS + j) * L, L)]
                    )
        T.evaluate(stamp(DATA, first, 1))
        for j in T.unroll(1, _STREAMS):
            acc[0, ramp(0, L)] = acc[0, ramp(0, L)] + acc[j, ramp(0, L)]
        data[ramp(first, L)] = acc[0, ramp(0, L)]
        return T.int32(0)

    return probe_reading


def multiplying(isa: Isa, add: Callable[[Isa, Expr, Expr], Expr]) -> PrimFunc:
    """Make the kernel that lets `add` change every sum `amount` times: words, words -> words."""
    L, sums = isa.lanes, isa.tuning.probe_sums

    @T.prim_func(private=True, s_tir=True)
    def probe_multiplying(
        DATA: T.handle("int32"), amount: T.int64, tid: T.int32, nt: T.int32
    ) -> T.int32:
        data = T.decl_buffer((T.int64(1) << 40,), "int32", data=DATA)
        first: T.let[T.int64] = T.cast(tid, "int64") * _PAGE_WORDS
        acc = T.alloc_buffer((sums, L), "int32", annotations=STACK)
        factor: T.let[getattr(T, vector("int32", L))] = data[ramp(first + sums * L, L)]
        for j in T.unroll(sums):
            acc[j, ramp(0, L)] = data[ramp(first + j * L, L)]
        T.evaluate(stamp(DATA, first, 0))
        for _turn in T.serial(amount):
            for j in T.unroll(sums):
                acc[j, ramp(0, L)] = add(isa, acc[j, ramp(0, L)], factor)
        T.evaluate(stamp(DATA, first, 1))
        for j in T.unroll(1, sums):
            acc[0, ramp(0, L)] = acc[0, ramp(0, L)] + acc[j, ramp(0, L)]
        data[ramp(first, L)] = acc[0, ramp(0, L)]
        return T.int32(0)

    return probe_multiplying


def stamp(data: Expr, first: Expr, index: int) -> Expr:
    """Note the cycle counter in the part of DATA that begins with word `first`."""
    place = T.reinterpret(data, dtype="int64") + first * 4 + STAMP_BYTES
    return T.call_extern("int32", "q35c_stamp", place, T.int64(index))


def add_bytes(isa: Isa, total: Expr, factor: Expr) -> Expr:
    operation = "dot4_u8s8" if isa.offers("dot4_u8s8") else "add2_u8s8"
    return apply(isa, operation, total, total, factor)


def add_pairs(isa: Isa, total: Expr, factor: Expr) -> Expr:
    value = T.reinterpret(total, dtype=vector("float32", isa.lanes))
    value = apply(isa, "dot2_bf16", value, total, factor)
    return T.reinterpret(value, dtype=vector("int32", isa.lanes))


def add_products(isa: Isa, total: Expr, factor: Expr) -> Expr:
    value, scale = (T.reinterpret(x, dtype=vector("float32", isa.lanes)) for x in (total, factor))
    return T.reinterpret(value * scale + scale, dtype=vector("int32", isa.lanes))
