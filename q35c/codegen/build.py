"""TIR functions to the bytes of one shared object, through TVM, LLVM and the system linker.

The shared object needs no other library and imports no symbol. The same functions give the same bytes.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, compilation_pipeline

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.sync import BF16_IR, SUPPORT_IR, barrier
from q35c.codegen.program import BARRIER_FUNCTION, kernel_symbol
from q35c.errors import ToolchainError

_PIPELINE = "q35c"


def _pipeline_factory() -> tuple[object, object, object]:
    # TVM's own pipeline without StorageRewrite, which moves stack buffers to the heap, without
    # CompactBufferAllocation and LoopPartition, without the passes for other devices, and without
    # those that LLVM does again (a third of the compile time).
    lower = tvm.ir.transform.Sequential(
        [
            s_tir.transform.LowerInitBlock(),
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
            s_tir.transform.ConvertBlocksToOpaque(),
            s_tir.transform.LowerOpaqueBlock(),
            tirx.transform.FlattenBuffer(),
            tirx.transform.NarrowDataType(32),
            tirx.transform.VectorizeLoop(True),
            tirx.transform.UnrollLoop(),
            tirx.transform.StmtSimplify(),
            tirx.transform.VerifyMemory(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
        ]
    )
    return (
        lower,
        compilation_pipeline.finalize_host_passes,
        compilation_pipeline.finalize_device_passes,
    )


compilation_pipeline.register_tir_pipeline(_PIPELINE, _pipeline_factory)


def compile_module(
    functions: Mapping[str, PrimFunc], entries: Mapping[str, PrimFunc], isa: Isa
) -> tvm.runtime.Module:
    """Lower private kernels and public entries to one TVM module of machine code for `isa`."""
    members = {kernel_symbol(name): functions[name] for name in sorted(functions)}
    members[BARRIER_FUNCTION] = barrier()
    for name in sorted(entries):
        members[tvm.ir.GlobalVar(name)] = _with_support(entries[name], isa)
    target = tvm.target.Target(
        {"kind": "llvm", "mcpu": isa.llvm_cpu, "mattr": list(isa.llvm_features)}
    )
    return tirx.build(tvm.IRModule(members), target=target, pipeline=_PIPELINE)


def _with_support(entry: Any, isa: Isa) -> PrimFunc:
    support = SUPPORT_IR + (BF16_IR if isa.has_bf16 else "")
    body = tirx.AttrStmt(T.int32(0), "pragma_import_llvm", tvm.ir.StringImm(support), entry.body)
    return entry.with_body(body)


def build_shared(
    functions: Mapping[str, PrimFunc], entries: Mapping[str, PrimFunc], isa: Isa
) -> bytes:
    """Compile private kernels and the public programs that call them by name into a shared object.

    `program_entry` makes the entries; each is exported as `__tvm_ffi_<name>`. The barrier kernel is added.
    ToolchainError when no linker is found or linking fails.
    """
    module = compile_module(functions, entries, isa)
    with tempfile.TemporaryDirectory(prefix="q35c-") as folder:
        module.write_to_file(str(Path(folder) / "code.o"))
        return _link(Path(folder), "code.o", "code.so")


def _link(folder: Path, source: str, result: str) -> bytes:
    # Relative names only: linkers may record the paths they are given.
    flags = ["-shared", "-s", "-o", result, source]
    if linker := shutil.which("ld"):
        command = [linker, "--build-id=none", "-z", "noexecstack", *flags]
    elif compiler := shutil.which("gcc") or shutil.which("cc"):
        command = [compiler, "-nostdlib", "-Wl,--build-id=none", *flags]
    else:
        raise ToolchainError(
            "no linker was found",
            expected="ld (binutils) or gcc on PATH",
            hint="install binutils",
        )
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        raise ToolchainError(
            "the linker failed", where=command[0], got=run.stderr.strip() or f"rc {run.returncode}"
        )
    return (folder / result).read_bytes()
