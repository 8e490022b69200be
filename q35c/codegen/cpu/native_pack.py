"""Machine code that packs integer weights on the machine that compiles."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from q35c.codegen.backend import Load
from q35c.codegen.calls import Call, Nt, Pointer, Tid, Tokens
from q35c.codegen.cpu.build import build_shared
from q35c.codegen.cpu.isa.x86 import detect
from q35c.codegen.cpu.kernels.products.pack_integers import pack_integers
from q35c.codegen.cpu.program import program_entry
from q35c.codegen.pack import Pack, PackedWeight, pack_blocks
from q35c.errors import InternalError
from q35c.formats.registry import integer_format
from q35c.layouts.weights import BLOCK, block_shape


def packer(weights: Iterable[PackedWeight], load: Load) -> Pack:
    """Return what packs rows: compiled code for integer formats."""
    code = packer_code(weights)
    library = None if code is None else load(code)

    def pack(rows: np.ndarray, dtype: str) -> np.ndarray:
        if library is None or integer_format(dtype) is None:
            return pack_blocks(rows, dtype)
        rows = np.ascontiguousarray(rows)
        blocks, inputs = len(rows) // BLOCK, rows.shape[1]
        out = np.empty((blocks, *block_shape(dtype, inputs)), np.uint8)
        # The call convention is that of programs: rows for weights, blocks for the arena, their number for tokens.
        entry = library.entry(packer_symbol(inputs, dtype))
        if entry((rows.ctypes.data, 0, out.ctypes.data, 0, 0, blocks)):
            raise InternalError("the packer failed", got=(dtype, rows.shape))
        return out

    return pack


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
