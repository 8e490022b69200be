"""How finely threads divide a kernel's work, when they take its parts one by one instead of equal shares.

Threads are rarely equally fast: cores differ, clocks change, and on a shared machine somebody else takes a part of one. With
equal shares all wait for the slowest (measured on two virtual cores: prompts 6 to 11 % slower). A part costs a claim, 50 ns
on two cores, so that small work keeps equal shares. Which thread does a part changes no bit.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.cpu.kernels.experts.products import BLOCK_COST_ROWS
from q35c.codegen.cpu.kernels.family import PART_BYTES

PARTS_PER_THREAD = 32  # a thread waits for at most a thirty-second of its own work
FEWEST_PARTS = 4  # for each thread: fewer leave one without work longer than equal shares do


def count_parts() -> PrimFunc:
    """Make the function that writes to PART[1] the number of parts, which is that of the threads if parts would be too small
    or too few, and to PART[0] -1.
    """

    @T.prim_func(private=True, s_tir=True)
    def count(
        PART: T.handle("int32"), tokens: T.int64, bytes: T.int64, most: T.int64, nt: T.int32
    ) -> T.int32:
        part = T.decl_buffer((2,), "int32", data=PART)
        turns: T.let[T.int64] = T.truncdiv(tokens + (BLOCK_COST_ROWS - 1), T.int64(BLOCK_COST_ROWS))
        worth: T.let[T.int64] = T.min(T.truncdiv(turns * bytes, T.int64(PART_BYTES)), most)
        parts: T.let[T.int32] = T.min(T.cast(worth, "int32"), nt * PARTS_PER_THREAD)
        part[0] = T.int32(-1)
        part[1] = T.Select(parts < nt * FEWEST_PARTS, nt, parts)
        return T.int32(0)

    return count
