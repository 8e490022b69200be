"""The backend of host processors: threads of one process, host memory, an instruction set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from q35c.codegen.backend import Built, KernelKey, Load, Program, Progress
from q35c.codegen.calls import Cost, Division, Pointer, Signature
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.isa.x86 import ISAS, detect
from q35c.layouts.cache import CacheLayout, cache_layout
from q35c.layouts.rows import RowLayout

if TYPE_CHECKING:
    from q35c.codegen.pack import Pack, PackedWeight
    from q35c.codegen.requests import Shared
    from q35c.codegen.schedule import Schedule
    from q35c.ir.graph import Graph

# What needs TVM is imported where it is used: to name a target, or to find a compiled model by it, must not take seconds.


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """Code for one instruction set."""

    name: str  # canonical, e.g. cpu:x86-64-v3
    isa: Isa
    max_threads: int = 16
    has_towers: bool = True
    prefill_tokens: int = 256
    logits_bytes: int = 32 << 20
    decode_tasks: int = 32  # parts of one sequence's attention in decode: two for each thread
    split_cells: int = (
        256  # least part of the full context, beside whose bytes a part's sums are few
    )

    def describe(self) -> dict[str, Any]:
        features = list(self.isa.cpu_features)
        named = {"backend": "cpu", "name": self.name}
        return {**named, "cpu_features": features, "lanes": self.isa.lanes}

    def cache_layout(self, dtype: str) -> CacheLayout:
        return cache_layout(dtype, self.isa.offers("dot2_bf16"))

    def row_layout(self, dtype: str) -> RowLayout:
        if dtype == "bf16":
            return "bf16-pairs" if self.isa.offers("dot2_bf16") else "bf16-words"
        return "int8-sums" if self.isa.offers("dot4_u8s8") else "int8-sums-starts"

    def decode_splits(self, kv_heads: int, context: int) -> int:
        """Return into how many parts the cells of one key head are split when a decode step attends to them."""
        return max(1, min(-(-self.decode_tasks // kv_heads), context // self.split_cells))

    def signature(self, family: str, parameters: Mapping[str, Any]) -> Signature:
        from q35c.codegen.cpu.families import signature

        return signature(family, parameters)

    def cost(self, family: str, parameters: Mapping[str, Any]) -> Cost:
        from q35c.codegen.cpu.families import FAMILIES

        return FAMILIES[family].cost(parameters)

    def scratch_bytes(self, family: str, max_tokens: int, parameters: Mapping[str, Any]) -> int:
        from q35c.codegen.cpu.families import FAMILIES
        from q35c.codegen.cpu.kernels.family import Room

        size = FAMILIES[family].scratch
        return size(parameters, Room(self.isa, self.max_threads, max_tokens)) if size else 0

    def division(self, family: str, parameters: Mapping[str, Any]) -> Division | None:
        from q35c.codegen.cpu.families import FAMILIES

        divide = FAMILIES[family].division
        return divide(parameters) if divide else None

    def check_tools(self) -> None:
        from q35c.codegen.cpu.build import find_linker

        find_linker()

    def lower(self, graph: Graph, shared: Shared, max_tokens: int) -> Schedule:
        from q35c.codegen.cpu.lower import lower

        return lower(graph, shared, max_tokens)

    def build(
        self,
        kernels: Mapping[KernelKey, str],
        programs: Mapping[str, Program],
        clock: Pointer,
        progress: Progress,
    ) -> Built:
        from q35c.codegen.cpu.build import build_shared
        from q35c.codegen.cpu.families import make_kernels
        from q35c.codegen.cpu.probes import probes
        from q35c.codegen.cpu.program import check_calls, program_entry

        entries = {name: program_entry(name, calls, clock) for name, calls in programs.items()}
        measuring = probes(self.isa)
        entries |= {probe.symbol: probe.program() for probe in measuring}
        progress("kernels", 0.0)
        functions = make_kernels(kernels, self.isa, lambda done: progress("kernels", done))
        functions |= {p.symbol: p.kernel for p in measuring if p.kernel}
        for calls in programs.values():
            check_calls(calls, functions)
        progress("machine code", 0.0)
        code = build_shared(
            functions, entries, self.isa, lambda done: progress("machine code", done)
        )
        return Built(code, [probe.describe() for probe in measuring], self.describe())

    def packer(self, weights: Iterable[PackedWeight], load: Load) -> Pack:
        from q35c.codegen.cpu.native_pack import packer

        return packer(weights, load)


def find_cpu(level: str) -> CpuBackend:
    """Return the backend of a level of instruction sets, one of `cpu_names`; of this machine's own for ""."""
    isa = ISAS[level] if level else detect()
    return CpuBackend(f"cpu:{isa.name}", isa)


def cpu_names() -> list[str]:
    """Return the names of all targets of this backend."""
    return ["cpu", *(f"cpu:{isa}" for isa in ISAS)]
