"""Build kernels and call them on numpy arrays, with sentinels around every array.

    kernels = build_kernels({"norm": rms_norm(64, 1e-6, 1.0, V3)}, V3)
    x, weight, y = guard(x), guard(weight), guard(np.zeros_like(x))
    kernels.call("norm", x, weight, y, 3, 64, 64)          # tid and nt are added, and worker where there is one
    kernels.call("norm", x, weight, y, 3, 64, 64, threads=2)

Arguments stand in the kernel's parameter order: arrays for pointers, Python ints for int64 scalars. One build may
hold many kernels; a kernel may be called with any shapes its parameters allow.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.cpu.build import build_shared, compile_kernel
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.isa.x86 import ISAS, V3, detect
from q35c.codegen.cpu.kernels.rows.round_int8 import row_layout
from q35c.codegen.cpu.program import Parameters, as_pointer, call_kernel, entry_function
from q35c.codegen.pack import PackedWeight
from q35c.cpuinfo import processor_flags
from q35c.formats import registry
from q35c.runtime.cpu.library import Arguments, Library, Workers

ISA = V3  # runs on every machine that runs these tests
BEST = detect()
EACH_ISA = [  # fixture parameters: AVX2, and the best that this processor has
    pytest.param(V3, id="v3"),
    pytest.param(BEST, id="best", marks=pytest.mark.skipif(BEST is V3, reason="needs AVX-512")),
]
EVERY_ISA = [  # fixture parameters: each level has its own product of bytes
    pytest.param(
        isa,
        id=name,
        marks=pytest.mark.skipif(
            not processor_flags().issuperset(isa.cpu_features), reason=f"needs {name}"
        ),
    )
    for name, isa in ISAS.items()
]
FLOATS = ("f32", "bf16")  # formats whose packing and rounding are written here once more
GUARD_BYTES = 256
_PATTERN = np.uint8(0xFF)  # 0xFFFFFFFF is a NaN: what reads a guard shows it in its result

_DISPATCH = "dispatch"
_workers: dict[int, Workers] = {}


class GuardedArray(np.ndarray):
    """Mark an array that owns its guards; views of it lose the mark."""

    guarded_block: np.ndarray


def guard(array: np.ndarray, poison: bool = False) -> np.ndarray:
    """Copy an array to a 64-byte aligned place between two guards; `poison` fills it with the guard's NaN bytes."""
    array = np.ascontiguousarray(array)
    block = np.full(array.nbytes + 2 * GUARD_BYTES + 64, _PATTERN, np.uint8)
    start = GUARD_BYTES + (-(block.ctypes.data + GUARD_BYTES) % 64)
    result = block[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    if not poison:
        result[...] = array
    result = result.view(GuardedArray)
    result.guarded_block = block
    return result


def assert_guards(array: np.ndarray) -> None:
    """Fail when something wrote outside a guarded array."""
    block = getattr(array, "guarded_block", None)
    assert block is not None, "pass arrays made by guard(), not views of them"
    start = array.ctypes.data - block.ctypes.data
    before, after = block[:start], block[start + array.nbytes :]
    assert (before == _PATTERN).all(), (
        f"{(before != _PATTERN).sum()} bytes written before the array"
    )
    assert (after == _PATTERN).all(), f"{(after != _PATTERN).sum()} bytes written after the array"


class RoundedRows:
    """Rows that a kernel rounds to int8 beside the exact ones it writes; with group 0 it rounds none.

    The kernels it is checked with must hold `quantize_rows`.
    """

    def __init__(self, count: int, width: int, group: int, isa: Isa = ISA) -> None:
        self.layout = row_layout(width, group, isa) if group else None
        words = self.layout.words if self.layout else 16
        self.words = guard(np.zeros((count, words), np.int32), poison=True)

    def check(self, kernels: Kernels, y: np.ndarray, name: str = "round") -> None:
        """Fail unless every word is what rounding the exact rows gives."""
        if self.layout is None:
            return
        want, exact = guard(np.zeros(self.words.shape, np.int32)), guard(y)
        kernels.call(name, exact, want, len(want), exact.shape[1], want.shape[1])
        used = self.layout.used_words
        np.testing.assert_array_equal(self.words[:, :used], want[:, :used])


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the squared error relative to the squared reference, in float64; NaN anywhere gives infinity."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shapes differ: {actual.shape} and {expected.shape}"
    if not np.isfinite(actual).all():
        return float("inf")
    error, power = np.square(actual - expected).sum(), np.square(expected).sum()
    return float(error / power) if power else float(error)


def assert_close(
    actual: np.ndarray, expected: np.ndarray, limit: float = 1e-7, note: object = ""
) -> None:
    """Fail when the NMSE is over the limit."""
    error = nmse(actual, expected)
    assert error <= limit, f"NMSE {error:.2e} > {limit:.0e} {note}"


def to_bf16(array: np.ndarray) -> np.ndarray:
    """Round f32 to bf16, nearest even, as uint16."""
    word = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(array: np.ndarray) -> np.ndarray:
    """Widen uint16 bf16 to f32."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def pack_formatted(weight: np.ndarray, dtype: str, layout: str = "linear") -> np.ndarray:
    """Pack [N, K], gate over up, or experts by the compiler's own packer: tests/codegen/test_pack.py is its test.

    Floats are packed by the functions below, which are written for tests alone.
    """
    parts = np.split(weight, 2) if layout == "swiglu" else [weight]
    names = tuple(f"s{i}" for i in range(len(parts)))
    packed = PackedWeight("w", layout, dtype, names, tuple(p.shape for p in parts))
    chunks = packed.chunks(lambda name, start, stop: parts[int(name[1:])][start:stop])
    return guard(np.concatenate([chunk.reshape(-1) for chunk in chunks]))


def pack_rows(weight: np.ndarray, dtype: str) -> np.ndarray:
    """Pack f32 [N, K] into blocks of 32 output rows as the kernels read them: f32 [ceil(N/32), K, 32] or
    int32 [ceil(N/32), ceil(K/2), 32] of bf16 pairs, even k low."""
    rows, columns = weight.shape
    padded = np.zeros((-(-rows // 32) * 32, columns + columns % 2), np.float32)
    padded[:rows, :columns] = weight
    if dtype == "f32":
        return np.ascontiguousarray(padded[:, :columns].reshape(-1, 32, columns).transpose(0, 2, 1))
    pairs = to_bf16(padded).view(np.int32)  # [N, ceil(K/2)]
    return np.ascontiguousarray(pairs.reshape(-1, 32, pairs.shape[1]).transpose(0, 2, 1))


def pack_swiglu(gate: np.ndarray, up: np.ndarray, dtype: str) -> np.ndarray:
    """Pack gate and up [I, K] so that block j holds gate rows 16j.. and then up rows 16j.. ."""
    count, columns = gate.shape
    blocks = -(-count // 16)
    mixed = np.zeros((blocks, 2, 16, columns), np.float32)
    for half, weight in enumerate((gate, up)):
        padded = np.zeros((blocks * 16, columns), np.float32)
        padded[:count] = weight
        mixed[:, half] = padded.reshape(blocks, 16, columns)
    return pack_rows(mixed.reshape(blocks * 32, columns), dtype)


def stored(weight: np.ndarray, dtype: str) -> np.ndarray:
    """Return the weight as float64 with the values that packing keeps."""
    weight = weight.astype(np.float32)
    if dtype not in FLOATS:
        return registry.stored(weight, dtype).astype(np.float64)
    return (from_bf16(to_bf16(weight)) if dtype == "bf16" else weight).astype(np.float64)


def own_parameters(kernel: PrimFunc) -> list[tirx.Var]:
    """Return a kernel's parameters before tid and nt, and before the worker of one with scratch for each thread."""
    return [p for p in kernel.params[:-2] if p.name != "worker"]


def _dispatcher(kernels: Mapping[str, PrimFunc]) -> PrimFunc:
    """Return the program that runs the kernel whose place is the first int64 word at `io`, with the words behind it.

    One entry serves every kernel and shape; T is the number of parts. An entry for each kernel would be a third of the time
    to compile.
    """
    parameters = Parameters.make()
    tid, nt, turn = parameters.tid, parameters.nt, tirx.Var("turn", "int32")
    base = tirx.Var("base", tvm.ir.PointerType(tvm.ir.PrimType("int64")))
    count = max(len(kernel.params) for kernel in kernels.values())
    words = tirx.decl_buffer((count,), "int64", data=base)
    parts = T.cast(parameters.tokens, "int32")
    run: tirx.Stmt = tirx.Evaluate(0)
    for place, (name, kernel) in enumerate(kernels.items()):
        loads = [
            as_pointer(words[at]) if isinstance(p.ty, tvm.ir.PointerType) else words[at]
            for at, p in enumerate(own_parameters(kernel), start=1)
        ]
        worker = [tid] * (len(kernel.params) - 2 - len(loads))
        call = call_kernel(name, [*loads, *worker, tid + turn * nt, parts])
        run = tirx.IfThenElse(words[0] == place, call, run)
    turns = T.truncdiv(parts - tid + (nt - 1), nt)
    statements = [
        tirx.Bind(base, T.reinterpret(parameters.blobs["io"], dtype=base.ty)),
        tirx.DeclBuffer(words, data=base),
        tirx.For(turn, 0, turns, tirx.ForKind.SERIAL, run),
    ]
    return entry_function(_DISPATCH, parameters, statements)


class Kernels:
    """Hold compiled kernels by name."""

    def __init__(self, functions: Mapping[str, PrimFunc], isa: Isa) -> None:
        self.isa = isa
        self.code = build_shared(functions, {_DISPATCH: _dispatcher(functions)}, isa)
        self._library = Library(self.code)
        self._places = {name: place for place, name in enumerate(functions)}
        self._counts = {name: len(own_parameters(f)) for name, f in functions.items()}

    def call(
        self, name: str, *arguments: np.ndarray | int, threads: int = 1, parts: int = 0
    ) -> None:
        """Run one kernel on `threads` threads, which take its parts in turn, then check the guards of every array.

        Without `parts` there are as many as threads.
        """
        assert len(arguments) == self._counts[name], (
            f"{name} takes {self._counts[name]} arguments before tid and nt, got {len(arguments)}"
        )
        words = np.array([self._places[name], *map(_word, arguments)], np.int64)
        workers = _workers.setdefault(threads, Workers(threads))
        workers.run(
            self._library.entry(_DISPATCH),
            Arguments(0, 0, 0, words.ctypes.data, 0, parts or threads),
        )
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                assert_guards(argument)


def _word(argument: np.ndarray | int) -> int:
    if isinstance(argument, np.ndarray):
        assert argument.ctypes.data % 64 == 0, "arrays must be 64-byte aligned: use guard()"
        return argument.ctypes.data
    return int(argument)


def build_kernels(functions: Mapping[str, PrimFunc], isa: Isa = ISA) -> Kernels:
    """Compile all kernels of one test file into one shared object."""
    return Kernels(functions, isa)


def compile_only(kernel: PrimFunc, isa: Isa, register: str) -> str:
    """Compile one kernel for an instruction set this machine may lack; fail when its assembly
    does not use `register` (zmm, ymm). Return the assembly."""
    assembly = compile_kernel("only", kernel, isa).inspect_source("asm")
    assert f"%{register}" in assembly, f"no {register} register in the code"
    return assembly
