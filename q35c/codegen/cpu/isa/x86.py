"""The x86-64 levels that kernels are generated for.

Kernels depend on a level through `lanes`, the number of f32 values in one vector register, `registers`, how many of
these there are, and on whether there are instructions for int8 (`has_vnni`) and bf16 (`has_bf16`) products and for
permuting bytes of a whole register (`has_vbmi`); for the rest LLVM picks the instructions. Levels: x86-64 psABI, chapter
3.1; v4-vnni and v4-bf16 are v4 with what their names say, v4-bf16 with VBMI too (Cascade Lake and later; Sapphire
Rapids, Zen 4 and later).
"""

from __future__ import annotations

from q35c.codegen.cpu.isa.base import Isa
from q35c.cpuinfo import processor_flags
from q35c.errors import UnsupportedMachine

_V3_FEATURES = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4_FEATURES = (*_V3_FEATURES, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_VNNI_FEATURES = (*_V4_FEATURES, "avx512_vnni")
_BF16_FEATURES = (*_VNNI_FEATURES, "avx512_bf16", "avx512vbmi")
_V4 = "x86-64-v4"

V3 = Isa("x86-64-v3", 8, 16, "x86-64-v3", (), _V3_FEATURES)
V4 = Isa(_V4, 16, 32, _V4, (), _V4_FEATURES)
V4_VNNI = Isa("x86-64-v4-vnni", 16, 32, _V4, ("+avx512vnni",), _VNNI_FEATURES, has_vnni=True)
V4_BF16 = Isa(
    "x86-64-v4-bf16", 16, 32, _V4, ("+avx512vnni", "+avx512bf16", "+avx512vbmi"), _BF16_FEATURES,
    has_vnni=True, has_bf16=True, has_vbmi=True,
)  # fmt: skip
ISAS = {isa.name: isa for isa in (V3, V4, V4_VNNI, V4_BF16)}


def detect(flags: frozenset[str] | None = None) -> Isa:
    """Return the highest level that the processor offers; UnsupportedMachine when it offers none."""
    flags = processor_flags() if flags is None else flags
    for isa in reversed(ISAS.values()):
        if flags.issuperset(isa.cpu_features):
            return isa
    raise UnsupportedMachine(
        "this processor offers no supported instruction set",
        expected=" ".join(V3.cpu_features),
        got=" ".join(sorted(flags.intersection(V3.cpu_features))) or "none of them",
        hint="use a machine with AVX2 and FMA, or compile for it from another machine",
    )
