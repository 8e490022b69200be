"""The x86-64 levels that kernels are generated for.

Kernels depend on a level only through `lanes`, the number of f32 values in one vector register, and
`registers`, how many of these there are; LLVM picks the instructions. Levels: x86-64 psABI, chapter 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from q35c.errors import IncompatibleCPU


@dataclass(frozen=True)
class Isa:
    """Describe one instruction set: vector width, LLVM cpu name and the /proc/cpuinfo flags it needs."""

    name: str
    lanes: int
    registers: int
    llvm_target: str
    cpu_features: tuple[str, ...]


_V3_FEATURES = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4_FEATURES = ("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")

V3 = Isa("x86-64-v3", 8, 16, "x86-64-v3", _V3_FEATURES)
V4 = Isa("x86-64-v4", 16, 32, "x86-64-v4", _V3_FEATURES + _V4_FEATURES)
ISAS = {isa.name: isa for isa in (V3, V4)}


def read_cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the feature flags of this machine's first processor, as the kernel names them."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def detect(flags: frozenset[str] | None = None) -> Isa:
    """Return the widest level that the processor offers; IncompatibleCPU when it offers none."""
    flags = read_cpu_flags() if flags is None else flags
    for isa in (V4, V3):
        if flags.issuperset(isa.cpu_features):
            return isa
    raise IncompatibleCPU(
        "this processor offers no supported instruction set",
        expected=" ".join(V3.cpu_features),
        got=" ".join(sorted(flags.intersection(V3.cpu_features))) or "none of them",
        hint="use a machine with AVX2 and FMA, or compile for it from another machine",
    )
