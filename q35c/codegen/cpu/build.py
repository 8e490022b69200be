"""TIR functions to the bytes of one shared object, through TVM, LLVM and the system linker.

Kernels and programs are compiled apart, on all cores at once, and meet in the linker. The shared object needs no other
library and imports nothing but memset and memcpy. The same functions give the same bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, compilation_pipeline

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.program import HELPERS, helper_symbol, kernel_symbol
from q35c.codegen.cpu.support import BF16_IR, SUPPORT_IR
from q35c.errors import ToolchainError

_PIPELINE = "q35c"
# TVM makes a packed function of what has the default convention; this says that it is one already, and nothing is done.
_C_CALL = tvm.ir.function.CallingConv.C_PACKED_FUNC
_MOST_THREADS = 16  # each holds the LLVM module of a kernel


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


def build_shared(
    functions: Mapping[str, PrimFunc],
    entries: Mapping[str, PrimFunc],
    isa: Isa,
    progress: Callable[[float], None] = lambda done: None,
) -> bytes:
    """Compile kernels and the public programs that call them by name into a shared object.

    `program_entry` makes the entries; each is exported as `__tvm_ffi_<name>`, and nothing else is. Every kernel and every
    program becomes an object of its own, on all cores at once. `progress` gets the fraction done.
    ToolchainError when no linker is found or linking fails.
    """
    objects = {f"entry_{name}": {name: entries[name]} for name in sorted(entries)}
    objects |= {kernel_symbol(name): _kernel(name, functions[name]) for name in sorted(functions)}
    helpers = {helper_symbol(name): make() for name, make in HELPERS.items()}
    objects["helpers"] = {symbol: _c_function(symbol, f) for symbol, f in helpers.items()}
    with (
        tempfile.TemporaryDirectory(prefix="q35c-") as folder,
        ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST_THREADS)) as pool,
    ):

        def write(name: str) -> str:
            _build(objects[name], isa).write_to_file(str(Path(folder) / f"{name}.o"))
            return f"{name}.o"

        names: list[str] = []
        for name in pool.map(write, objects):
            names.append(name)
            progress(len(names) / len(objects))
        return _link(Path(folder), names, "code.so")


def compile_kernel(name: str, function: PrimFunc, isa: Isa) -> tvm.runtime.Module:
    """Return the machine code of one kernel."""
    return _build(_kernel(name, function), isa)


def _kernel(name: str, function: PrimFunc) -> dict[str, PrimFunc]:
    return {kernel_symbol(name): _c_function(kernel_symbol(name), function)}


def _c_function(symbol: str, function: Any) -> PrimFunc:
    return function.with_attr({"global_symbol": symbol, "calling_conv": _C_CALL})


def _build(members: Mapping[str, PrimFunc], isa: Isa) -> tvm.runtime.Module:
    target = tvm.target.Target(
        {"kind": "llvm", "mcpu": isa.llvm_cpu, "mattr": list(isa.llvm_features)}
    )
    module: dict[Any, Any] = {**members, "q35c_support": _support(isa)}
    return tirx.build(tvm.IRModule(module), target=target, pipeline=_PIPELINE)


@T.prim_func(private=True, s_tir=True)
def _nothing() -> T.int32:
    return T.int32(0)


def _support(isa: Isa) -> PrimFunc:
    """Return a function that LLVM drops, but with which what kernels call by name comes into a module."""
    text = tvm.ir.StringImm(SUPPORT_IR + (BF16_IR if isa.has_bf16 else ""))
    function: Any = _nothing
    return function.with_body(tirx.AttrStmt(T.int32(0), "pragma_import_llvm", text, function.body))


def _link(folder: Path, sources: Sequence[str], result: str) -> bytes:
    # Relative names only: linkers may record the paths they are given. Kernels stay inside: calls reach them directly.
    (folder / "exports").write_text("{ global: __tvm_ffi_*; local: *; };")
    flags = ["-shared", "-s", "-o", result, *sources]
    options = ["--build-id=none", "--gc-sections", "--version-script=exports"]
    if linker := shutil.which("ld"):
        command = [linker, *options, "-z", "noexecstack", *flags]
    elif compiler := shutil.which("gcc") or shutil.which("cc"):
        command = [compiler, "-nostdlib", f"-Wl,{','.join(options)}", *flags]
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
