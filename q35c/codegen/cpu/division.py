"""How finely threads divide a kernel's work, when they take its parts one by one instead of equal shares.

Threads are rarely equally fast: cores differ, clocks change, and on a shared machine somebody else takes a part of one. With
equal shares all wait for the slowest (measured on two virtual cores: prompts 6 to 11 % slower). A part costs a claim, 50 ns
on two cores, so that small work keeps equal shares. Which thread does a part changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.calls import Division
from q35c.codegen.cpu.kernels.attention.shape import QUERY_ROWS
from q35c.codegen.cpu.kernels.experts.products import BLOCK_COST_ROWS
from q35c.codegen.cpu.kernels.linear.linear import FEW_BLOCKS
from q35c.formats.registry import integer_format
from q35c.ir.types import DTYPE_BYTES
from q35c.layouts.weights import BLOCK, ceil_div

PARTS_PER_THREAD = 32  # a thread waits for at most a thirty-second of its own work
FEWEST_PARTS = 4  # for each thread: fewer leave one without work longer than equal shares do
PART_BYTES = 256 << 10  # least work of a part: what takes about 10 us to read


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


def division_of(family: str, parameters: Mapping[str, Any]) -> Division | None:
    """Return how to divide a kernel's work, or None if it is never worth it."""
    rule = _RULES.get(family)
    return rule(**parameters) if rule else None


def _weight_bytes(N: int, K: int, dtype: str) -> int:
    form = integer_format(dtype)
    return N * K * form.bits // 8 if form else N * K * DTYPE_BYTES[dtype]


def _linear(N: int, K: int, dtype: str, group: int = 0, **_: Any) -> Division | None:
    blocks = ceil_div(N, BLOCK)
    if blocks <= FEW_BLOCKS:
        return None  # they are split by rows, which share more of what is unpacked if they stay together
    # Columns that are rounded stay in groups.
    return Division(N // 2 // group if group else blocks, _weight_bytes(N, K, dtype))


def _gate_up(I: int, H: int, dtype: str, top_k: int, **_: Any) -> Division:  # noqa: E741
    return _experts(2 * I, H, dtype, top_k)


def _down(I: int, H: int, dtype: str, top_k: int, **_: Any) -> Division:  # noqa: E741
    return _experts(H, I, dtype, top_k)


def _experts(N: int, K: int, dtype: str, top_k: int) -> Division:
    return Division(top_k * ceil_div(N, BLOCK), top_k * _weight_bytes(N, K, dtype))


def _attention(
    Hq: int, Hkv: int, D: int, context: int, rows: str, splits: int, **_: Any
) -> Division:
    if rows == "batch":  # keys and values, were the sequence half as long as it may become
        return Division(Hkv * splits, context // 2 * Hkv * D * 4)
    # Of a task, on any target: more parts than tasks do no harm.
    fewest_rows = min(QUERY_ROWS.values())
    return Division(ceil_div(Hq * context, fewest_rows), PART_BYTES)


def _gated_delta(Hk: int, Hv: int, Dk: int, Dv: int, **_: Any) -> Division:
    return Division(Hk, Hv * Dk * Dv * 8)  # the state, read and written


_RULES: dict[str, Callable[..., Division | None]] = {
    "linear": _linear,
    "expert_gate_up": _gate_up,
    "expert_down": _down,
    "attention": _attention,
    "gated_delta": _gated_delta,
    "gated_delta_decode": _gated_delta,
}
