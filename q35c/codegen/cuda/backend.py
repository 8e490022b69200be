"""The backend of NVIDIA devices: kernels as images for some architectures, programs as launch tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from q35c.codegen.backend import Built, KernelKey, Load, Program, Progress
from q35c.codegen.calls import Cost, Division, Pointer, Signature
from q35c.layouts.cache import CacheLayout, cache_layout
from q35c.layouts.rows import RowLayout

if TYPE_CHECKING:
    from q35c.codegen.pack import Pack, PackedWeight
    from q35c.codegen.requests import Shared
    from q35c.codegen.schedule import Schedule
    from q35c.ir.graph import Graph

# As nvcc calls them. `cuda` means those of EVERY; the others are asked for by name.
EVERY = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
KNOWN = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_120", "sm_120a")

# What needs TVM is imported where it is used: to name a target must not take seconds.


@dataclass(frozen=True, slots=True)
class CudaBackend:
    """Code for some architectures."""

    name: str  # canonical, e.g. cuda or cuda:sm_90a
    architectures: tuple[str, ...]
    max_threads: int = 1  # programs run on one stream
    has_towers: bool = False
    prefill_tokens: int = 256
    logits_bytes: int = 32 << 20
    decode_blocks: int = (
        64  # of one sequence's attention, about; a device has as many multiprocessors and more
    )
    split_cells: int = 256  # least part of the full context

    def describe(self) -> dict[str, Any]:
        return {"backend": "cuda", "name": self.name}

    def cache_layout(self, dtype: str) -> CacheLayout:
        return cache_layout(dtype, has_bf16_pairs=False)

    def row_layout(self, dtype: str) -> RowLayout:
        return "bf16-pairs" if dtype == "bf16" else "int8-sums"

    def decode_splits(self, kv_heads: int, context: int) -> int:
        """Return into how many parts the cells of one key head are split when a decode step attends to them."""
        return max(1, min(self.decode_blocks // (4 * kv_heads), context // self.split_cells))

    def signature(self, family: str, parameters: Mapping[str, Any]) -> Signature:
        from q35c.codegen.cuda.families import signature

        return signature(family, parameters)

    def cost(self, family: str, parameters: Mapping[str, Any]) -> Cost:
        from q35c.codegen.cuda.families import FAMILIES

        return FAMILIES[family].cost(parameters)

    def scratch_bytes(self, family: str, max_tokens: int, parameters: Mapping[str, Any]) -> int:
        return 0

    def division(self, family: str, parameters: Mapping[str, Any]) -> Division | None:
        return None

    def check_tools(self) -> None:
        from q35c.codegen.cuda.images import check_tools

        check_tools(self.architectures)

    def lower(self, graph: Graph, shared: Shared, max_tokens: int) -> Schedule:
        from q35c.codegen.cuda.lower import lower

        return lower(graph, shared, max_tokens)

    def build(
        self,
        kernels: Mapping[KernelKey, str],
        programs: Mapping[str, Program],
        clock: Pointer,
        progress: Progress,
    ) -> Built:
        from q35c.codegen.cuda.build import build

        return build(self, kernels, programs, progress)

    def packer(self, weights: Iterable[PackedWeight], load: Load) -> Pack:
        from q35c.codegen.pack import pack_blocks

        return pack_blocks


def find_cuda(level: str) -> CudaBackend:
    """Return the backend of an architecture, one of `cuda_names`; of all that are made by default for ""."""
    if not level:
        return CudaBackend("cuda", EVERY)
    return CudaBackend(f"cuda:{level}", (level,))


def cuda_names() -> list[str]:
    """Return the names of all targets of this backend."""
    from q35c.codegen.cuda.images import MAKERS

    return ["cuda", *(f"cuda:{name}" for name in (*KNOWN, *MAKERS))]
