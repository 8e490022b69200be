"""The tile of 6 rows and 2 vectors with sums of 16 bits (narrow_sums.py), as AVX2 instructions.

As assembly because it lives from the number of instructions, loads and moves included: Zen 3 ends 4.6 of them a cycle,
whatever they are. These are 3.3 for 4 inputs of a row and vector; LLVM makes 4.3 of the same statements, as it spills what 16
registers would just hold, and then 6 rows are no faster than 4 with sums of 32 bits. This is 16 % faster, and 6 % where
another thread shares the core. The loop takes 32 inputs: written out for a group of 128 it is a fifth slower than those, as
its 1,200 instructions come from the decoders.
"""

from __future__ import annotations

from q35c.ir.formats import SUM_INPUTS

ROWS, VECTORS = 6, 2
_LINE = 128  # bytes of a word of the panel, and of a row of f32 sums: 32 outputs
_WORDS = SUM_INPUTS // 4
_SUMS = ROWS * VECTORS  # registers 0 to 11; 12 and 13 hold levels, 14 a word of a row, 15 a product
_LEVELS, _ROW, _PRODUCT = _SUMS, _SUMS + VECTORS, _SUMS + VECTORS + 1

# Operands of the assembly: what it advances, then what stays. The inputs in between are tied to the first ones.
_CODES, _SCALES, _STARTS, _PANEL, _COLUMNS, _END, _FIRST_ROW, _OUT = 0, 1, 2, 3, 4, 5, 6, 12


def tile_name(group: int) -> str:
    return f"q35c_narrow_tile_{group}"


def tile_ir(group: int) -> str:
    """Return the function (6 rows, offsets of the first group's codes, scale and starts in them, panel, sums, groups).

    Offsets count bytes. The panel holds for each group a line for each 4 inputs, and one of scales; from the address on 64
    bytes of each are read. It adds to f32 sums [6, 32], of which each row's first 16 are meant.
    """
    rows = ", ".join(f"ptr %row{i}" for i in range(ROWS))
    moved = ("codes", "scales", "starts", "panel", "columns")
    results = f"{{ {', '.join(['i64'] * len(moved))} }}"
    clobbers = (
        ",".join(f"~{{xmm{i}}}" for i in range(16)) + ",~{memory},~{dirflag},~{fpsr},~{flags}"
    )
    constraints = "=&r,=&r,=&r,=&r,=&r,r," + "r," * ROWS + f"r,0,1,2,3,4,{clobbers}"
    text = "\\0A".join(_instructions(group))
    operands = ", ".join(
        ["i64 %end", *(f"ptr %row{i}" for i in range(ROWS)), "ptr %sums"]
        + [f"i64 %{name}" for name in moved]
    )
    return f"""
define linkonce_odr hidden i32 @{tile_name(group)}({rows}, i64 %codes, i64 %scales, i64 %starts, ptr %first, ptr %sums, i64 %count) noinline {{
  %panel = ptrtoint ptr %first to i64
  %columns = add i64 %panel, {group // 4 * _LINE}
  %inputs = mul i64 %count, {group}
  %end = add i64 %codes, %inputs
  %r = call {results} asm sideeffect "{text}", "{constraints}"({operands})
  ret i32 0
}}
"""


def _instructions(group: int) -> list[str]:
    """Return a loop over blocks of 32 inputs; a group's end moves on to the next scales."""
    lines = ["1:"]
    for word in range(_WORDS):
        lines += _word(word)
    lines += _finish()
    steps = {_CODES: SUM_INPUTS, _STARTS: 4, _PANEL: _WORDS * _LINE}
    lines += [f"addq $${step}, ${operand}" for operand, step in steps.items()]
    if group > SUM_INPUTS:
        lines += [f"testb $${group - 1}, ${{{_CODES}:b}}", "jne 1b"]
    steps = {_SCALES: 4, _PANEL: _LINE, _COLUMNS: (group // 4 + 1) * _LINE}
    lines += [f"addq $${step}, ${operand}" for operand, step in steps.items()]
    return [*lines, f"cmpq ${_END}, ${_CODES}", "jne 1b"]


def _word(word: int) -> list[str]:
    """Return the products of 4 inputs."""
    lines = []
    for v in range(VECTORS):
        lines.append(f"vmovdqa {word * _LINE + 32 * v}(${_PANEL}), %ymm{_LEVELS + v}")
    for i in range(ROWS):
        lines.append(f"vpbroadcastd {4 * word}(${_FIRST_ROW + i}, ${_CODES}), %ymm{_ROW}")
        if word == 0:
            lines.append(f"vpbroadcastd (${_FIRST_ROW + i}, ${_STARTS}), %ymm{_PRODUCT}")
        for v in range(VECTORS):
            total = i * VECTORS + v
            product = total if word == 0 else _PRODUCT
            lines.append(f"vpmaddubsw %ymm{_ROW}, %ymm{_LEVELS + v}, %ymm{product}")
            lines.append(f"vpaddw %ymm{_PRODUCT}, %ymm{total}, %ymm{total}")
    return lines


def _finish() -> list[str]:
    """Return the end of 32 inputs: their sums, times the column's and the row's scale, join those in f32."""
    lines = []
    for i in range(ROWS):
        lines.append(f"vbroadcastss (${_FIRST_ROW + i}, ${_SCALES}), %ymm{_ROW}")
        for v in range(VECTORS):
            total, place = i * VECTORS + v, f"{i * _LINE + 32 * v}(${_OUT})"
            lines.append(f"vpmaddwd {32 * v}(${_COLUMNS}), %ymm{total}, %ymm{total}")
            lines.append(f"vcvtdq2ps %ymm{total}, %ymm{total}")
            lines.append(f"vfmadd213ps {place}, %ymm{_ROW}, %ymm{total}")
            lines.append(f"vmovaps %ymm{total}, {place}")
    return lines
