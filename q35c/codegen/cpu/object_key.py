"""The name under which machine code is kept: a hash of all that decides its bytes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping

import tvm
import tvm_ffi
from tvm.tirx import PrimFunc


def object_key(
    members: Mapping[str, PrimFunc], support: str, target: tvm.target.Target, recipe: str
) -> str:
    """Hash functions, the LLVM text that comes with them, the target, and what compiles them.

    `recipe` names the passes and their options. The functions' text holds every number to its
    last bit; TVM's own hash of their structure, which does not go through the printer, would tell apart what the
    printer wrote alike.
    """
    parts = [_compiler(), recipe, str(target), support]
    for symbol, function in sorted(members.items()):
        structure = tvm_ffi.structural_hash(function, map_free_vars=True)
        parts += [symbol, function.script(show_meta=True), str(structure)]
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


@functools.cache
def _compiler() -> str:
    llvm = tvm.get_global_func("target.llvm_version_major")()
    return f"tvm {tvm.__version__}, llvm {llvm}"
