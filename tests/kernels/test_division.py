"""Divided kernels: every part is done once, whatever the threads, and the counters are ready for the next run."""

from __future__ import annotations

import numpy as np
import pytest
from tvm.script import tirx as T

from q35c.codegen.calls import Barrier, Call, Division, Int, Part, Parts, Pointer, Tid, Tokens
from q35c.codegen.cpu.build import build_shared
from q35c.codegen.cpu.division import FEWEST_PARTS, PART_BYTES, PARTS_PER_THREAD
from q35c.codegen.cpu.program import program_entry
from q35c.codegen.targets import find_target
from q35c.layouts.blobs import BARRIER_BYTES, DIVIDED_CALLS, PART_COUNTERS
from q35c.runtime.cpu.library import Arguments, Library, Workers
from tests.kernels.harness import ISA, guard

ALL_ROWS = Tokens()
MOST = 100
SLOW = Division(MOST, PART_BYTES)  # a part for each 8 tokens
FINE = Division(7, 1 << 50)
MANY = 2 * DIVIDED_CALLS + 3
NEXT = 4 * (MOST + 28)  # bytes from one array of the arena to the next


@T.prim_func(private=True, s_tir=True)
def mark(
    Y: T.handle("int32"), rows: T.int64, worker: T.int32, part: T.int32, parts: T.int32
) -> T.int32:
    y = T.decl_buffer((128,), "int32", data=Y)
    y[part] = y[part] + 1
    y[112 + worker] = parts
    return T.int32(0)


@pytest.fixture(scope="module")
def library():
    def call(array: int, division: Division, rows: Tokens | Int = ALL_ROWS) -> Call:
        place = Pointer("arena", array * NEXT)
        return Call("mark", (place, rows, Tid(), Part(), Parts()), division)

    # The first two have no barrier between them: a thread may begin the second while others do the first.
    calls = [call(0, SLOW), call(1, FINE), Barrier(), call(2, SLOW), call(3, SLOW, Int(1))]
    many = [call(number, SLOW) for number in range(MANY)]
    programs = {n: program_entry(n, c) for n, c in (("marks", calls), ("many", many))}
    return Library(build_shared({"mark": mark}, programs, ISA))


def parts_of(division: Division, tokens: int, threads: int) -> int:
    worth = min((tokens + 7) // 8 * division.bytes // PART_BYTES, division.most)
    parts = min(worth, threads * PARTS_PER_THREAD)
    return threads if parts < threads * FEWEST_PARTS else parts


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_every_part_is_done_once(library, threads):
    workers, barrier = Workers(threads), guard(np.zeros(BARRIER_BYTES // 4, np.int32))
    for run in range(60):
        tokens = (1, 64, 200, 1000)[run % 4]
        arena = guard(np.zeros((4, NEXT // 4), np.int32))
        workers.run(
            library.entry("marks"),
            Arguments(0, 0, arena.ctypes.data, 0, barrier.ctypes.data, tokens),
        )
        # The last computes one row, whatever T is.
        for row, division, rows in zip(
            arena, (SLOW, FINE, SLOW, SLOW), (*[tokens] * 3, 1), strict=True
        ):
            parts = parts_of(division, rows, threads)
            assert (row[:parts] == 1).all() and not row[parts:112].any()
            assert set(row[112:]) <= {0, parts}
        assert not barrier[PART_COUNTERS // 4 :].any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_more_calls_than_counters(library, threads):
    workers, barrier = Workers(threads), guard(np.zeros(BARRIER_BYTES // 4, np.int32))
    for _ in range(20):
        arena = guard(np.zeros((MANY, NEXT // 4), np.int32))
        addresses = (0, 0, arena.ctypes.data, 0, barrier.ctypes.data)
        workers.run(library.entry("many"), Arguments(*addresses, 1000))
        assert (arena[:, : parts_of(SLOW, 1000, threads)] == 1).all()
        assert not barrier[PART_COUNTERS // 4 :].any()


def test_small_work_keeps_equal_shares(library):
    """Without a counter: each thread does the share of its number."""
    arena, barrier = guard(np.zeros((4, NEXT // 4), np.int32)), guard(np.zeros(48, np.int32))
    Workers(3).run(
        library.entry("marks"), Arguments(0, 0, arena.ctypes.data, 0, barrier.ctypes.data, 8)
    )
    assert list(arena[0, 112:116]) == [3, 3, 3, 0]


def test_what_is_divided():
    big = {"N": 7168, "K": 1024, "dtype": "i4g64"}
    divide = find_target("cpu:x86-64-v3").division
    assert divide("linear", big) == Division(224, 7168 * 1024 // 2)
    assert divide("linear", {**big, "N": 64}) is None
    assert divide("rms_norm", {"D": 1024}) is None
