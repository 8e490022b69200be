"""What kernels ask of an instruction set, whatever the processor's family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """Describe one instruction set: vector width, LLVM cpu and features, the /proc/cpuinfo flags it needs."""

    name: str
    lanes: int
    registers: int
    llvm_cpu: str
    llvm_features: tuple[str, ...]
    cpu_features: tuple[str, ...]
    has_vnni: bool = False
    has_bf16: bool = False
    has_vbmi: bool = False
