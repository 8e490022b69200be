"""Machine code that packs integer weights on the machine that compiles."""

from __future__ import annotations

from collections.abc import Iterable

from q35c.codegen.cpu.build import build_shared
from q35c.codegen.cpu.isa.x86 import detect
from q35c.codegen.cpu.kernels.products.pack_integers import pack_integers
from q35c.codegen.cpu.program import Call, Nt, Pointer, Tid, Tokens, program_entry
from q35c.codegen.pack import PackedWeight
from q35c.ir.formats import integer_format


def packer_symbol(inputs: int, dtype: str) -> str:
    """Name the entry that packs rows of `inputs` values."""
    return f"pack_{dtype}_{inputs}"


def packer_code(weights: Iterable[PackedWeight]) -> bytes | None:
    """Return a shared object with one entry for each row length and format, None if none is integer.

    An entry packs `tokens` blocks of 32 rows from the address `weights` to the address `arena`.
    """
    wanted = sorted({(w.inputs, w.dtype) for w in weights if integer_format(w.dtype)})
    if not wanted:
        return None
    isa = detect()
    names = {packer_symbol(*one): one for one in wanted}
    functions = {name: pack_integers(*one, isa) for name, one in names.items()}
    out = Pointer("arena", 0)
    arguments = (Pointer("weights", 0), out, out, Tokens(), Tid(), Nt())
    entries = {name: program_entry(name, [Call(name, arguments)]) for name in names}
    return build_shared(functions, entries, isa)
