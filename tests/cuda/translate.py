"""Turn CUDA text into C++ of the same kernels for the machine of `simt/`, changing as little as can be.

Statements of asm become calls of emulated instructions, `extern __shared__` becomes a pointer, and a table of the kernels
follows. Everything else is what nvcc reads, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ASM = re.compile(r"(?:asm|__asm__)\s*(?:volatile|__volatile__)?\s*\(")
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(')
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\((\d+)\) )?((?:\w+ )*\w+) (\w+)\[\];")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_TABLE = """
extern "C" {{
extern char __start_simt_shared[] __attribute__((weak));
extern char __stop_simt_shared[] __attribute__((weak));
extern __attribute__((visibility("default"))) const SimtKernel simt_kernels[];
const SimtKernel simt_kernels[] = {{ {rows} }};
__attribute__((visibility("default"))) SimtModule simt_module =
    {{ 1, {count}, simt_kernels, __start_simt_shared, __stop_simt_shared }};
}}
"""


def kernels_of(source: str) -> list[str]:
    """Return the names of the kernels in CUDA text, each once: a text may declare what it defines."""
    return list(dict.fromkeys(match[1] for match in _KERNEL.finditer(source)))


def translate(source: str) -> str:
    """Return C++ that the machine runs."""
    parts, at = [], 0
    for match in _ASM.finditer(source):
        end = _closing(source, match.end())
        parts += [source[at : match.start()], _calls(source[match.end() : end]), " "]
        at = end + 1
    text = _DYNAMIC.sub(_pointer, "".join([*parts, source[at:]]))
    names = kernels_of(text)
    rows = ", ".join(
        f'simt_describe("{name}", {name}, [](void** p) {{ simt_unpack({name}, p); }})'
        for name in names
    )
    table = _TABLE.format(rows=rows, count=len(names))
    return f'#include "simt.h"\n#line 1 "kernel.cu"\n{text}{table}'


def _pointer(match: re.Match[str]) -> str:
    align, kind, name = match[1] or 16, match[2], match[3]
    return f"{kind}* {name} = ({kind}*)simt_dynamic_shared({align});"


def _closing(source: str, start: int) -> int:
    """Return where the bracket closes that was opened before `start`."""
    depth = 1
    for index, char in _unquoted(source, start):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if depth == 0:
            return index
    raise ValueError("an asm statement does not end")


def _unquoted(text: str, start: int = 0) -> Iterator[tuple[int, str]]:
    """Yield the characters outside of strings."""
    index, quoted = start, False
    while index < len(text):
        char = text[index]
        if quoted and char == "\\":
            index += 1
        elif char == '"':
            quoted = not quoted
        elif not quoted:
            yield index, char
        index += 1


def split_top(text: str, separator: str) -> list[str]:
    """Split at separators outside of brackets and strings; of `::` both colons separate."""
    parts, depth, start = [], 0, 0
    for index, char in _unquoted(text):
        depth += _BRACKETS.get(char, 0)
        if char == separator and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def _calls(inside: str) -> str:
    """Return the calls of what stands between the brackets of an asm statement."""
    sections = [*split_top(inside, ":"), "", ""]
    ptx = "".join(_STRING.findall(sections[0])).replace("\\n", "\n").replace("\\t", " ")
    operands = [
        _operand(item) for part in sections[1:3] for item in split_top(part, ",") if item.strip()
    ]
    if "mbarrier.try_wait.parity" in ptx:  # a loop with labels around it
        return f"ptx_mbarrier_wait_parity({operands[0]}, {operands[1]});"
    named: dict[str, str] = {}
    calls = []
    for line in re.sub(r"^\s*\{|\}\s*$", "", ptx).split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name.startswith(".reg"):
            continue
        values = [_value(value, named, operands) for value in _arguments(rest)]
        if name.startswith("setp.ne"):
            named[values[0]] = f"({values[1]} != {values[2]})"
            continue
        calls.append(f"ptx_{re.sub('[.:]', '_', name)}({', '.join(values)});")
    return " ".join(calls) or ";"


def _operand(item: str) -> str:
    match = re.search(r'"[^"]*"\s*\((.*)\)\s*$', item, re.DOTALL)
    assert match is not None, item
    return match[1]


def _arguments(rest: str) -> list[str]:
    plain = re.sub(r"[\[\]{}]", " ", rest)
    return [value.strip() for value in plain.split(",") if value.strip() not in ("", "_")]


def _value(value: str, named: dict[str, str], operands: list[str]) -> str:
    return re.sub(r"%(\d+)", lambda match: f"({operands[int(match[1])]})", named.get(value, value))
