"""Programs, the shared object, and the threads that run it."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from tvm.script import tirx as T

from q35c.codegen.calls import Barrier, Call, Int, Nt, Pointer, Tid, Tokens
from q35c.codegen.cpu import build
from q35c.codegen.cpu.build import build_shared
from q35c.codegen.cpu.kernels.vectors import share
from q35c.codegen.cpu.program import check_calls, program_entry
from q35c.errors import ExecutionError, LoweringError, OptionError, ToolchainError
from q35c.runtime.cpu.library import Arguments, Library, Workers
from tests.elf import dynamic_symbols
from tests.kernels.harness import ISA, guard
from tests.shares import StandIn

ROOT = Path(__file__).parents[2]
COUNT = 96  # elements of the vectors that the programs work on
STEPS = 50  # kernels in the chain, a barrier between each two


def reverse_plus(value):
    """y[i] = x[COUNT - 1 - i] + value: every thread reads what another one wrote."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        X: T.handle("float32"), Y: T.handle("float32"), tid: T.int32, nt: T.int32
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        x = T.decl_buffer((COUNT,), "float32", data=X)
        y = T.decl_buffer((COUNT,), "float32", data=Y)
        first: T.let[T.int64] = share(COUNT, tid, nt)
        for i in T.serial(share(COUNT, tid + 1, nt) - first):
            y[first + i] = x[COUNT - 1 - first - i] + T.float32(value)
        return T.int32(0)

    return kernel


@T.prim_func(private=True, s_tir=True)
def record(
    Y: T.handle("int64"), tokens: T.int64, constant: T.int64, tid: T.int32, nt: T.int32
) -> T.int32:
    y = T.decl_buffer((8,), "int64", data=Y)
    if tid == 0:
        y[0] = tokens
        y[1] = constant
        y[2] = T.cast(nt, "int64")
    return T.int32(0)


@T.prim_func(private=True, s_tir=True)
def halve(X: T.handle("float32"), tid: T.int32, nt: T.int32) -> T.int32:
    x = T.decl_buffer((1,), "float32", data=X)
    if tid == 0:
        x[0] = x[0] * T.float32(0.5)
    return T.int32(0)


def chain():
    """Reverse back and forth between two vectors in the arena."""
    here, there = Pointer("arena", 0), Pointer("arena", COUNT * 4)
    calls = []
    for step in range(STEPS):
        x, y = (here, there) if step % 2 == 0 else (there, here)
        calls += [Call("reverse", (x, y, Tid(), Nt())), Barrier()]
    return calls


@pytest.fixture(scope="module")
def code():
    kernels = {"reverse": reverse_plus(1.0), "record": record, "halve": halve}
    last_row = Pointer("io", 64, row_bytes=128, last_row=True)
    return build_shared(
        kernels,
        {
            "chain": program_entry("chain", chain()),
            "record": program_entry(
                "record", [Call("record", (last_row, Tokens(), Int(1 << 40), Tid(), Nt()))]
            ),
            "halve": program_entry("halve", [Call("halve", (Pointer("arena", 0), Tid(), Nt()))]),
        },
        ISA,
    )


@pytest.fixture(scope="module")
def library(code):
    return Library(code)


class Chain:
    """One arena and one set of barrier words for the chain program."""

    def __init__(self, library):
        self.entry = library.entry("chain")
        self.arena = guard(np.zeros(2 * COUNT, np.float32))
        self.barrier = guard(np.zeros(32, np.int32))

    def run(self, workers, threads=None):
        self.arena[:COUNT] = start = np.arange(COUNT)
        addresses = (0, 0, self.arena.ctypes.data, 0, self.barrier.ctypes.data)
        workers.run(self.entry, Arguments(*addresses, tokens=1), threads)
        np.testing.assert_array_equal(self.arena[:COUNT], start + STEPS)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_barriers_order_the_kernels(library, threads):
    workers, program = Workers(threads), Chain(library)
    for _ in range(20):
        program.run(workers)
    assert program.barrier[0] == 0, "the arrival count must be ready for the next run"
    assert program.barrier[16] == (0 if threads == 1 else 20 * STEPS), "one generation a barrier"


def test_callers_of_one_workers_object_take_turns(library):
    workers, failures = Workers(2), []
    shared = Chain(library)  # safe only when runs do not overlap

    def caller():
        try:
            for _ in range(10):
                with_own = Chain(library)
                with_own.barrier = shared.barrier
                with_own.run(workers)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=caller) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("threads", [1, 2])
def test_program_arguments(library, threads):
    io = guard(np.zeros(8 + 16 * 3, np.int64))
    arguments = Arguments(0, 0, 0, io.ctypes.data, guard(np.zeros(32, np.int32)).ctypes.data, 3)
    Workers(threads).run(library.entry("record"), arguments)
    row = 8 + 16 * 2  # 64 bytes, then two rows of 128 bytes
    assert list(io[row : row + 3]) == [3, 1 << 40, threads]
    io[row : row + 3] = 0
    assert not io.any(), "something was written elsewhere"


def test_denormals_are_flushed_inside_and_kept_outside(library):
    denormal = np.float32(1e-39)
    x = guard(np.array([denormal], np.float32))
    assert library.entry("halve")(Arguments(0, 0, x.ctypes.data, 0, 0, 1)) == 0
    assert x[0] == 0
    assert np.array([denormal]) * np.float32(0.5) != 0, "the caller's mode was not restored"


def test_a_second_library_is_its_own_code(library):
    others = []
    for value in (10.0, 20.0):
        code = build_shared(
            {"reverse": reverse_plus(value)}, {"chain": program_entry("chain", chain()[:1])}, ISA
        )
        others.append(Library(code))
    arena = guard(np.zeros(2 * COUNT, np.float32))
    for other, value in zip(others, (10.0, 20.0), strict=True):
        other.entry("chain")(Arguments(0, 0, arena.ctypes.data, 0, 0, 1))
        assert (arena[COUNT:] == value).all()


def test_library_refuses(library):
    with pytest.raises(ExecutionError, match="lacks an entry"):
        library.entry("no_such_program")
    with pytest.raises(ExecutionError, match="cannot be loaded"):
        Library(b"\x7fELF but nothing else")


def test_workers_refuse(library, monkeypatch):
    with pytest.raises(ExecutionError, match="at least one thread"):
        Workers(0)
    workers, program = Workers(2), Chain(library)
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    with pytest.raises(OptionError, match="interpreter is ending"):
        program.run(workers)
    monkeypatch.undo()
    workers.close()
    with pytest.raises(ExecutionError, match="closed"):
        program.run(workers)


def failing(tid, failure):
    """Return an entry that reports or raises an error on one thread."""

    def share(me):
        if me == tid and isinstance(failure, BaseException):
            raise failure
        return failure if me == tid else 0

    return StandIn(share)


NOWHERE = Arguments(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("tid", [0, 1, 2])
def test_failures_are_reported_and_survived(library, tid):
    workers, program = Workers(3), Chain(library)
    with pytest.raises(ExecutionError, match="compiled code failed"):
        workers.run(failing(tid, -1), NOWHERE)
    program.run(workers)
    expected = ExecutionError if tid else MemoryError  # the caller's own exception stays itself
    with pytest.raises(expected):
        workers.run(failing(tid, MemoryError("none left")), NOWHERE)
    program.run(workers)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_fewer_threads_than_there_are(library, threads):
    workers, program = Workers(3), Chain(library)
    for asked in (threads, None, threads):
        program.run(workers, asked)
    seen = []
    workers.run(StandIn(lambda tid: seen.append(tid) or 0), NOWHERE, threads)
    assert sorted(seen) == list(range(threads))


def test_unused_workers_end():
    before = set(threading.enumerate())
    workers = Workers(3)
    threads = set(threading.enumerate()) - before  # of other tests some may end meanwhile
    assert len(threads) == 2
    del workers
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()


def test_misaligned_pointer_is_refused():
    with pytest.raises(LoweringError, match="not aligned"):
        program_entry("entry", [Call("kernel", (Pointer("arena", 102),))])


@pytest.mark.parametrize(
    "call",
    [
        Call("record", (Pointer("io", 0), Tokens(), Int(1), Tid())),
        Call("record", (Pointer("io", 0), Tokens(), Tid(), Tid(), Nt())),
        Call("record", (Tokens(), Tokens(), Int(1), Tid(), Nt())),
        Call("recorder", (Pointer("io", 0), Tokens(), Int(1), Tid(), Nt())),
    ],
    ids=["one too few", "int32 for int64", "a number for a pointer", "no such kernel"],
)
def test_calls_must_fit_their_kernels(call):
    fitting = Call("record", (Pointer("io", 0), Tokens(), Int(1), Tid(), Nt()))
    check_calls([fitting, Barrier(), fitting], {"record": record})
    with pytest.raises(LoweringError, match="does not fit its kernel"):
        check_calls([fitting, call], {"record": record})


def test_a_kernel_that_cannot_be_compiled(monkeypatch, tmp_path):
    """The error comes out, and nothing stays behind."""

    compile_module = build._build

    def fail(members, isa):
        if "kernel_halve" in members:
            raise RuntimeError("no code for halve")
        return compile_module(members, isa)

    monkeypatch.setattr(build, "_build", fail)
    monkeypatch.setenv("Q35C_CACHE", "off")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match="no code for halve"):
        build_shared({"halve": halve, "record": record}, {}, ISA)
    assert list(tmp_path.iterdir()) == []


def test_linker_problems_are_named(monkeypatch, tmp_path):
    entries = {"halve": program_entry("halve", [Call("halve", (Pointer("arena", 0), Tid(), Nt()))])}
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(ToolchainError, match="no linker"):
        build_shared({"halve": halve}, entries, ISA)
    broken = tmp_path / "ld"
    broken.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(broken))
    with pytest.raises(ToolchainError, match="out of luck"):
        build_shared({"halve": halve}, entries, ISA)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_gcc_links_when_ld_is_missing(monkeypatch):
    entries = {"halve": program_entry("halve", [Call("halve", (Pointer("arena", 0), Tid(), Nt()))])}
    which = shutil.which
    monkeypatch.setattr(build.shutil, "which", lambda name: None if name == "ld" else which(name))
    library = Library(build_shared({"halve": halve}, entries, ISA))
    x = guard(np.array([3.0], np.float32))
    assert library.entry("halve")(Arguments(0, 0, x.ctypes.data, 0, 0, 1)) == 0
    assert x[0] == 1.5


BUILD_AGAIN = """
import sys
sys.path.insert(0, {root!r})
from tests.kernels import test_library
sys.stdout.buffer.write(test_library.code.__wrapped__())
"""


def test_the_same_kernels_give_the_same_bytes(code):
    script = BUILD_AGAIN.format(root=str(ROOT))
    environment = {**os.environ, "PYTHONHASHSEED": "123", "Q35C_CACHE": "off"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=True, cwd="/"
    )
    assert run.stdout == code


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_shared_object_needs_nothing(code, tmp_path):
    file = tmp_path / "code.so"
    file.write_bytes(code)
    dynamic = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True)
    assert "NEEDED" not in dynamic.stdout
    imported, exported = dynamic_symbols(file)
    assert not imported
    assert exported == {f"__tvm_ffi_{name}" for name in ("chain", "record", "halve")}
    assert str(ROOT).encode() not in code and b"/tmp" not in code


RUN_LEAN = """
import ctypes, sys
sys.path.insert(0, {root!r})
from q35c.runtime.cpu.library import Arguments, Library, Workers
memory = ctypes.create_string_buffer(4096)
base = -(-ctypes.addressof(memory) // 64) * 64
library = Library(open({code!r}, "rb").read())
for threads in (1, 2):
    Workers(threads).run(library.entry("chain"), Arguments(0, 0, base, 0, base + 1024, 1))
floats = (ctypes.c_float * {count}).from_address(base)
assert sum(floats) == 2 * {count} * {steps}, sum(floats)
maps = open("/proc/self/maps").read()
assert "libtvm" not in maps and "torch" not in maps
heavy = {{"tvm", "tvm_ffi", "torch", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_runs_without_tvm(code, tmp_path):
    file = tmp_path / "code.so"
    file.write_bytes(code)
    script = RUN_LEAN.format(root=str(ROOT), code=str(file), count=COUNT, steps=STEPS)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
