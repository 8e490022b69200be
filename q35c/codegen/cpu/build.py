"""TIR functions to the bytes of one shared object, through TVM, LLVM and the system linker.

Kernels and programs are compiled apart, on all cores at once, and meet in the linker. The shared object needs no other
library and imports nothing but memset and memcpy. The same functions give the same bytes, whether their objects are
compiled or were kept from an earlier compilation.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, compilation_pipeline

from q35c.codegen.child import room_in, run_in_child, tool_failed
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.object_key import object_key
from q35c.codegen.cpu.program import HELPERS, helper_symbol, kernel_symbol
from q35c.codegen.cpu.support import support_ir
from q35c.errors import ToolchainError
from q35c.temporary import system_directory, temporary_folder
from q35c.user_cache import PrivateFolder, private_folder

_PIPELINE = "q35c"
_BAD_ALLOC = "std::bad_alloc"  # what C++ calls a MemoryError; TVM raises it as an error of its own
# TVM makes a packed function of what has the default convention; this says that it is one already, and nothing is done.
_C_CALL = tvm.ir.function.CallingConv.C_PACKED_FUNC
_FOLDER, _EXPORTS, _RESULT = "q35c-objects-", "exports", "code.so"
_KEPT = "objects"  # in the user's cache directory
_RECIPE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # of the passes and their options
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
    ToolchainError when no linker is found, or when compiling or linking fails for want of room or a limit.
    """
    objects = {f"entry_{name}": {name: entries[name]} for name in sorted(entries)}
    objects |= {kernel_symbol(name): _kernel(name, functions[name]) for name in sorted(functions)}
    helpers = {helper_symbol(name): make() for name, make in HELPERS.items()}
    objects["helpers"] = {symbol: _c_function(symbol, f) for symbol, f in helpers.items()}
    names = [f"{name}.o" for name in objects]
    command = _link_command(names)
    _target(isa)  # before the fork: with the first target LLVM sets itself up
    with temporary_folder(system_directory(), _FOLDER) as folder:

        def work(report: Callable[[float], None]) -> None:
            threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
            with private_folder(_KEPT) as kept, ThreadPoolExecutor(threads) as pool:

                def write(name: str) -> None:
                    _write_object(objects[name], isa, folder / f"{name}.o", kept)

                try:
                    results = pool.map(write, objects)
                except RuntimeError as error:  # raised here, it tells that a thread cannot start
                    raise _out_of_memory(error) from None
                for done, _ in enumerate(results, start=1):
                    report(done / len(objects))

        try:
            run_in_child("the compiler of machine code", folder, work, progress)
        except Exception as error:
            if isinstance(error, MemoryError) or _BAD_ALLOC in str(error):
                raise _out_of_memory(error) from None
            raise
        return _link(folder, names, command)


def _out_of_memory(error: Exception) -> ToolchainError:
    return ToolchainError(
        "cannot compile machine code for want of memory",
        got=str(error) or type(error).__name__,
        hint="end other programs or raise the limits (ulimit -a)",
    )


def compile_kernel(name: str, function: PrimFunc, isa: Isa) -> tvm.runtime.Module:
    """Return the machine code of one kernel."""
    return _build(_kernel(name, function), isa)


def _kernel(name: str, function: PrimFunc) -> dict[str, PrimFunc]:
    return {kernel_symbol(name): _c_function(kernel_symbol(name), function)}


def _c_function(symbol: str, function: Any) -> PrimFunc:
    return function.with_attr({"global_symbol": symbol, "calling_conv": _C_CALL})


@functools.cache
def _target(isa: Isa) -> tvm.target.Target:
    return tvm.target.Target(
        {"kind": "llvm", "mcpu": isa.llvm_cpu, "mattr": list(isa.llvm_features)}
    )


def _build(members: Mapping[str, PrimFunc], isa: Isa) -> tvm.runtime.Module:
    module: dict[Any, Any] = {**members, "q35c_support": _support(isa)}
    return tirx.build(tvm.IRModule(module), target=_target(isa), pipeline=_PIPELINE)


@T.prim_func(private=True, s_tir=True)
def _nothing() -> T.int32:
    return T.int32(0)


def _support(isa: Isa) -> PrimFunc:
    """Return a function that LLVM drops, but with which what kernels call by name comes into a module."""
    text = tvm.ir.StringImm(support_ir(isa))
    function: Any = _nothing
    return function.with_body(tirx.AttrStmt(T.int32(0), "pragma_import_llvm", text, function.body))


def _write_object(
    members: Mapping[str, PrimFunc], isa: Isa, path: Path, kept: PrivateFolder | None
) -> None:
    """Write an object that was kept, or compile it, and keep it."""
    if kept is None:
        _write(path, _build(members, isa).write_to_file)
        return
    key = object_key(members, support_ir(isa), _target(isa), _RECIPE)
    data = kept.load(key)
    if data is not None:
        _write(path, lambda name: Path(name).write_bytes(data))
        return
    _write(path, _build(members, isa).write_to_file)
    kept.store(key, path.read_bytes())


def _write(path: Path, write: Callable[[str], object]) -> None:
    try:
        write(str(path))
    except Exception as error:
        raise ToolchainError(
            "cannot write machine code",
            where=str(path.parent.parent),
            got=f"{error}; {room_in(path.parent)}",
            hint="let TMPDIR name a directory with more space, or raise the limits (ulimit -a)",
        ) from None


def _link(folder: Path, sources: Sequence[str], command: Sequence[str]) -> bytes:
    try:
        # Kernels stay inside: calls reach them directly.
        (folder / _EXPORTS).write_text("{ global: __tvm_ffi_*; local: *; };")
        run = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        if run.returncode:
            need = sum((folder / name).stat().st_size for name in sources)
            said = run.stderr.decode(errors="replace")
            raise tool_failed(f"the linker {command[0]}", folder, run.returncode, said, need)
        return (folder / _RESULT).read_bytes()
    except OSError as error:
        where = str(folder.parent)
        raise ToolchainError("cannot link machine code", where=where, got=error.strerror) from None


def find_linker() -> tuple[str, bool]:
    """Return the path of a linker and whether it is a compiler that calls one. Raises ToolchainError."""
    if linker := shutil.which("ld"):
        return linker, False
    if compiler := shutil.which("gcc") or shutil.which("cc"):
        return compiler, True
    raise ToolchainError(
        "no linker was found",
        expected="ld (binutils) or gcc on PATH",
        hint="install binutils",
    )


def _link_command(sources: Sequence[str]) -> list[str]:
    # Relative names only: linkers may record the paths they are given.
    flags = ["-shared", "-s", "-o", _RESULT, *sources]
    options = ["--build-id=none", "--gc-sections", f"--version-script={_EXPORTS}"]
    linker, is_compiler = find_linker()
    if is_compiler:
        return [linker, "-nostdlib", f"-Wl,{','.join(options)}", *flags]
    return [linker, *options, "-z", "noexecstack", *flags]
