"""Every kernel family by name, and the scratch that some of them need."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from q35c.codegen.backend import KernelKey, Parameters
from q35c.codegen.cpu.backend import CpuBackend
from q35c.codegen.cpu.fast_macros import install
from q35c.codegen.cpu.isa.x86 import Isa
from q35c.codegen.cpu.kernels.attention.prepare import attention_prepare
from q35c.codegen.cpu.kernels.attention.tasks import (
    attention,
    attention_combine,
    attention_scratch_bytes,
)
from q35c.codegen.cpu.kernels.delta.tasks import (
    gated_delta,
    gated_delta_decode,
    gated_delta_scratch_bytes,
)
from q35c.codegen.cpu.kernels.experts.products import expert_down, expert_gate_up
from q35c.codegen.cpu.kernels.experts.routing import combine, group_by_expert, route
from q35c.codegen.cpu.kernels.linear.embedding import embedding
from q35c.codegen.cpu.kernels.linear.linear import linear
from q35c.codegen.cpu.kernels.rows.norm import rms_norm
from q35c.codegen.cpu.kernels.rows.rotary import rotary_table
from q35c.codegen.cpu.kernels.rows.round_bf16 import round_rows
from q35c.codegen.cpu.kernels.rows.round_int8 import quantize_rows

install()

FAMILIES: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "attention_combine": attention_combine,
    "attention_prepare": attention_prepare,
    "combine": combine,
    "embedding": embedding,
    "expert_down": expert_down,
    "expert_gate_up": expert_gate_up,
    "gated_delta": gated_delta,
    "gated_delta_decode": gated_delta_decode,
    "group_by_expert": group_by_expert,
    "linear": linear,
    "quantize_rows": quantize_rows,
    "rms_norm": rms_norm,
    "rotary_table": rotary_table,
    "round_rows": round_rows,
    "route": route,
}


def make_kernels(
    wanted: Mapping[KernelKey, str], isa: Isa, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Generate kernels by name; `progress` hears which part of them is done."""
    made: dict[str, Any] = {}
    for key, name in wanted.items():
        made[name] = make_kernel(*key, isa)
        progress(len(made) / len(wanted))
    return made


@functools.cache
def make_kernel(family: str, parameters: Parameters, isa: Isa) -> Any:
    """Generate a kernel; parsing it takes far longer than asking for it again."""
    generate = FAMILIES[family]
    extra = {"isa": isa} if "isa" in inspect.signature(generate).parameters else {}
    return generate(**dict(parameters), **extra)


def scratch_bytes(
    family: str, target: CpuBackend, max_tokens: int, parameters: Mapping[str, Any]
) -> int:
    """Return the bytes of scratch that a kernel needs for all threads and rows."""
    if family == "gated_delta":
        names = ("Hk", "Hv", "Dk", "Dv")
        one = gated_delta_scratch_bytes(**{n: parameters[n] for n in names}, isa=target.isa)
        return max(one, 64) * target.max_threads
    if family in ("linear", "expert_gate_up"):  # rows that they round: products/rounded_blocks.py
        columns = (
            parameters["top_k"] * parameters["I"] if "I" in parameters else parameters["N"] // 2
        )
        return 4 * max_tokens * (parameters["group"] * target.max_threads + columns)
    return attention_scratch_bytes(target, max_tokens, parameters)
