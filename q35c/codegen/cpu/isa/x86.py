"""The x86-64 levels that kernels are generated for: a row for each instruction, and each level's tuning.

Levels: x86-64 psABI, chapter 3.1; v4-vnni and v4-bf16 are v4 with what their names say, v4-bf16 with VBMI too (Cascade Lake
and later; Sapphire Rapids, Zen 4 and later). Where no row says how, LLVM picks the instructions.
"""

from __future__ import annotations

from q35c.codegen.cpu.isa.base import Instruction, Isa, System, Tuning
from q35c.codegen.cpu.isa.operations import OPERATIONS
from q35c.cpuinfo import processor_flags
from q35c.errors import UnsupportedMachine

_V3_FEATURES = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4_FEATURES = (*_V3_FEATURES, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_VNNI_FEATURES = (*_V4_FEATURES, "avx512_vnni")
_BF16_FEATURES = (*_VNNI_FEATURES, "avx512_bf16", "avx512vbmi")
_V4 = "x86-64-v4"
_BYTES = {8: ("avx2",), 16: ("avx512bw",)}  # lanes -> what products of bytes need
_LINE = r"\0A"  # the end of a line of assembly
_FUTEX, _WAIT, _WAKE = 202, 128, 129  # the Linux system call and its process-private operations

# Flush-to-zero (bit 15) and denormals-are-zero (bit 6) of MXCSR: decayed state makes denormals, which are slow.
_FLUSH_BITS = 0x8040


def _assembled(operation: str, symbol: str, lanes: int, steps: tuple[str, ...]) -> Instruction:
    """Return a row for steps that add products of bytes to sums, $0, by way of $1.

    As one block of assembly: LLVM would add products to each other before it adds them to the sum, and with so many values
    alive spill sums that fit 16 registers (measured on Zen 3: tiles up to 7 % faster, one row as fast as before).
    """
    count = len(OPERATIONS[operation].takes) - 1
    kind = f"<{lanes} x i32>"
    taken = ", ".join(f"{kind} %{letter}" for letter in "usf"[:count])
    support = f"""
define linkonce_odr hidden {kind} @{symbol}({kind} %sum, {taken}) alwaysinline {{
  %r = call {{ {kind}, {kind} }} asm "{_LINE.join(steps)}", "=v,=&v,{"v," * count}0"({taken}, {kind} %sum)
  %total = extractvalue {{ {kind}, {kind} }} %r, 0
  ret {kind} %total
}}
"""
    words = ("int32",) * (1 + count)
    return Instruction(operation, lanes, symbol, _BYTES[lanes], words, "int32", support)


def _bytes_and_pairs(lanes: int, widen: str, shuffle: str) -> tuple[Instruction, ...]:
    """Return what every level has, on registers of so many lanes."""
    needs = _BYTES[lanes]
    add = ("vpmaddubsw $3, $2, $1", "vpaddw $1, $0, $0")
    dot = ("vpmaddubsw $3, $2, $1", "vpmaddwd $4, $1, $1", "vpaddd $1, $0, $0")
    return (
        _assembled("dot4_u8s8_factors", f"q35c_dot_bytes_x{lanes}", lanes, dot),
        _assembled("add2_u8s8", f"q35c_add_products_x{lanes}", lanes, add),
        Instruction("dot2_s16", lanes, widen, needs, ("int16", "int16"), "int32"),
        Instruction("lookup16", lanes, shuffle, needs, ("int8", "int8"), "int8"),
    )


_AVX2 = (
    *_bytes_and_pairs(8, "llvm.x86.avx2.pmadd.wd", "llvm.x86.avx2.pshuf.b"),
    Instruction(
        "move_sign_s8", 8, "llvm.x86.avx2.psign.b", ("avx2",), ("int8", "int8"), "int8"
    ),  # 16 words have no such instruction
)
_AVX512 = _bytes_and_pairs(16, "llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx512.pshuf.b.512")
_VNNI = Instruction(
    "dot4_u8s8",
    16,
    "llvm.x86.avx512.vpdpbusd.512",
    ("avx512_vnni",),
    ("int32", "int8", "int8"),
    "int32",
)
_VBMI = Instruction(
    "lookup64",
    16,
    "llvm.x86.avx512.permvar.qi.512",
    ("avx512vbmi",),
    ("int8", "int8"),
    "int8",
)

# TIR knows neither bfloat vectors nor these instructions. bf16 pairs travel as int32 words, the even element low.
_DOT2_BF16 = Instruction(
    "dot2_bf16",
    16,
    "q35c_dpbf16",
    ("avx512_bf16",),
    ("float32", "int32", "int32"),
    "float32",
    """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define linkonce_odr hidden <16 x float> @q35c_dpbf16(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
""",
)
_ROUND2_BF16 = Instruction(
    "round2_bf16",
    16,
    "q35c_pack_bf16",
    ("avx512_bf16",),
    ("float32", "float32"),
    "int32",
    """
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)

define linkonce_odr hidden <16 x i32> @q35c_pack_bf16(<16 x float> %low, <16 x float> %high) alwaysinline {
  %r = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %i = bitcast <32 x bfloat> %r to <16 x i32>
  ret <16 x i32> %i
}
""",
)
_SCALE_F32 = Instruction(
    "scale_f32",
    16,
    "q35c_scale_f32x16",
    ("avx512f",),
    ("float32", "float32"),
    "float32",
    """
declare <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float>, <16 x float>, <16 x float>, i16, i32)

define linkonce_odr hidden <16 x float> @q35c_scale_f32x16(<16 x float> %x, <16 x float> %power) alwaysinline {
  %r = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float> %x, <16 x float> %power, <16 x float> zeroinitializer, i16 -1, i32 4)
  ret <16 x float> %r
}
""",
)
# `nnan` lets the maximum be one instruction a step; the scores that it compares keep their NaN.
_MAX_F32 = Instruction(
    "max_f32",
    16,
    "q35c_max_f32x16",
    ("avx512f",),
    ("float32",),
    "float32",
    """
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)

define linkonce_odr hidden float @q35c_max_f32x16(<16 x float> %x) alwaysinline {
  %r = call nnan float @llvm.vector.reduce.fmax.v16f32(<16 x float> %x)
  ret float %r
}
""",
    is_scalar=True,
)

_LINUX_X86 = System(
    flush=f"""
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)

define linkonce_odr hidden i32 @q35c_flush_denormals() {{
  %word = alloca i32, align 4
  call void @llvm.x86.sse.stmxcsr(ptr %word)
  %old = load i32, ptr %word, align 4
  %new = or i32 %old, {_FLUSH_BITS}
  store i32 %new, ptr %word, align 4
  call void @llvm.x86.sse.ldmxcsr(ptr %word)
  ret i32 %old
}}

define linkonce_odr hidden i32 @q35c_restore_denormals(i32 %old) {{
  %word = alloca i32, align 4
  store i32 %old, ptr %word, align 4
  call void @llvm.x86.sse.ldmxcsr(ptr %word)
  ret i32 0
}}
""",
    wait=f'asm sideeffect "syscall", "={{rax}},{{rax}},{{rdi}},{{rsi}},{{rdx}},{{r10}},~{{rcx}},~{{r11}},~{{memory}}"(i64 {_FUTEX}, ptr %generation, i64 {_WAIT}, i64 %expected, i64 0)',
    wake=f'asm sideeffect "syscall", "={{rax}},{{rax}},{{rdi}},{{rsi}},{{rdx}},~{{rcx}},~{{r11}},~{{memory}}"(i64 {_FUTEX}, ptr %generation, i64 {_WAKE}, i64 2147483647)',
)

# 16 registers: sums of a tile, what is multiplied, and little else. Queries and sums of a task take 100 to 200 KiB of L2; AVX2
# widens keys and values once a task, which more rows share (96 instead of 72: 3 % faster). What is unpacked at once takes
# 8 KiB of L1 (3 % faster than 16). Two tall tiles of 4 or 6 rows gain from sharing what was unpacked.
_REGISTERS_16 = Tuning(
    float_rows=(6, 3, 2, 1),
    integer_rows=(4, 3, 2, 1),
    delta_rows=4,
    query_rows=96,
    query_tile_rows=(6, 4),
    has_assembled_tiles=True,
    slow_bits=(4, 5),
    sharing_tiles=2,
    unpacked_inputs=256,
    probe_sums=12,
)
# 32 registers: up to 6 tiles of 8 rows are as fast or faster alone; half of L1 is unpacked at once. 5 bits take more steps.
_REGISTERS_32 = Tuning(
    float_rows=(8, 4, 2, 1),
    integer_rows=(8, 6, 5, 4, 3, 2, 1),
    delta_rows=8,
    query_rows=64,
    query_tile_rows=(8,),
    has_assembled_tiles=False,
    slow_bits=(5,),
    sharing_tiles=8,
    unpacked_inputs=512,
    probe_sums=24,
)

V3 = Isa("x86-64-v3", 8, "x86-64-v3", (), _V3_FEATURES, _REGISTERS_16, _LINUX_X86, _AVX2)
V4 = Isa(_V4, 16, _V4, (), _V4_FEATURES, _REGISTERS_32, _LINUX_X86, _AVX512)
V4_VNNI = Isa(
    "x86-64-v4-vnni",
    16,
    _V4,
    ("+avx512vnni",),
    _VNNI_FEATURES,
    _REGISTERS_32,
    _LINUX_X86,
    (*_AVX512, _VNNI),
)
V4_BF16 = Isa(
    "x86-64-v4-bf16",
    16,
    _V4,
    ("+avx512vnni", "+avx512bf16", "+avx512vbmi"),
    _BF16_FEATURES,
    _REGISTERS_32,
    _LINUX_X86,
    (*_AVX512, _VNNI, _VBMI, _DOT2_BF16, _ROUND2_BF16, _SCALE_F32, _MAX_F32),
)
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
