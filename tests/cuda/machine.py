"""Run CUDA text on a CPU, checked: g++ compiles the very text that nvcc gets, and the machine of `simt/` runs its threads.

    image = build(text)
    findings = Machine().run(image, "norm_kernel", (3, 1, 1), (256, 1, 1), [x, weight, y, 3])

Every load and store goes through the machine, by way of g++'s instrumentation for ThreadSanitizer; findings name races, reads
of what nobody wrote, accesses out of bounds, misaligned ones, and barriers that some threads miss, with the line of the text.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q35c.user_cache import cache_directory
from tests.cuda.translate import translate

SIMT, DRIVER = (Path(__file__).with_name(name) for name in ("simt", "driver"))
Dims = tuple[int, int, int]


@dataclass(frozen=True)
class Traffic:
    """What a device would move: bytes that warps ask for, bytes of the sectors that hold them, accesses; and for shared
    memory the most words of one bank in an access.
    """

    asked: int
    moved: int
    accesses: int
    ways: int

    @property
    def share(self) -> float:
        """Return which part of what is moved is asked for."""
        return self.asked / self.moved


@dataclass(frozen=True)
class Same:
    """Stand for a pointer to the same buffer as that of another argument, by its number or in the harness its name."""

    as_argument: int | str
    kind: type[np.generic]


Argument = np.ndarray | int | Same
ORDERS: tuple[str | int, ...] = ("forward", "backward", 1, 2)  # of threads and blocks; or a seed

_FLAGS = (
    # Without unique symbols, with which an image would never be unloaded; own symbols first, as one process may hold several
    # emulated drivers.
    "-std=c++17", "-Wl,-Bsymbolic", "-march=native", "-fPIC", "-fno-stack-protector", "-w", "-fno-strict-aliasing", "-fno-gnu-unique", "-ffp-contract=fast",
    f"-I{SIMT}", f"-I{SIMT}/include", f"-I{DRIVER}",
)  # fmt: skip
# -O1 without vectorisers: what is optimised more merges accesses that a finding would name.
_CHECKED = (
    "-O1", "-g1", "-fno-tree-slp-vectorize", "-fno-tree-loop-vectorize", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment,bounds,signed-integer-overflow,shift-exponent,integer-divide-by-zero",
)  # fmt: skip


class Unknown(Exception):
    """Stand for CUDA text that the machine does not know."""


def build(source: str, *, is_checked: bool = True) -> Path:
    """Return the image of CUDA text: kept from an earlier run if it is the same. Raises Unknown."""
    return compiled([translate(source)], _CHECKED if is_checked else ("-O2",))


@functools.cache
def engine() -> Path:
    """Return the machine itself behind the emulated driver: one library, so that all images meet the same machine."""
    sources = (SIMT / "driver_machine.cpp", DRIVER / "driver.cpp")
    return compiled([source.read_text() for source in sources], ("-O3", "-g1"))


@functools.cache
def headers() -> bytes:
    """Return what every compilation depends on beside its text."""
    places = [*SIMT.rglob("*.h"), *DRIVER.rglob("*.h"), SIMT / "simt.cpp"]
    return b"\0".join(path.read_bytes() for path in sorted(places))


def compiled(texts: Sequence[str], flags: Sequence[str]) -> Path:
    """Compile C++ into a shared object that is kept. Skips the test where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    parts = [headers(), " ".join([*flags, *_FLAGS]).encode(), *(text.encode() for text in texts)]
    folder = cache_directory() / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if path.exists():
        return path
    made = [path.with_suffix(f".{os.getpid()}.{number}") for number in range(len(texts) + 1)]
    for text, unfinished in zip(texts, made[1:], strict=True):
        command = [compiler, "-x", "c++", "-c", "-", *_FLAGS, *flags, "-o", str(unfinished)]
        done = subprocess.run(command, input=text, text=True, capture_output=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            raise Unknown("\n".join(lines[:8]) or done.stderr[-2000:])
    # Linked apart: with -fsanitize=thread the linker would bring a library that defines the hooks, too.
    subprocess.run([compiler, "-shared", *_FLAGS, "-o", *made], check=True)
    for unfinished in made[1:]:
        unfinished.unlink()
    os.replace(made[0], path)
    return path


class _Dims(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("parameters", ctypes.c_int),
        ("sizes", ctypes.POINTER(ctypes.c_int)),
    ]


class _Module(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_int),
        ("count", ctypes.c_int),
        ("kernels", ctypes.POINTER(_Kernel)),
        ("shared_begin", ctypes.c_void_p),
        ("shared_end", ctypes.c_void_p),
    ]


class Machine:
    """One machine of this process. Buffers never share an address, so that use after free is seen."""

    def __init__(self) -> None:
        self._lib = lib = ctypes.CDLL(str(engine()), mode=ctypes.RTLD_GLOBAL)
        lib.simt_alloc.restype = ctypes.c_void_p
        lib.simt_reports.restype = ctypes.c_char_p

    def run(
        self,
        image: Path,
        name: str,
        grid: Dims,
        block: Dims,
        arguments: Sequence[Argument],
        *,
        shared_bytes: int = 0,
        order: str | int = "forward",
        constants: Collection[int] = (),
        traffic: dict[int, Traffic] | None = None,
    ) -> list[str]:
        """Run a kernel and return the findings; arrays are updated, those whose numbers are `constants` may not be written.

        With `traffic`, that becomes what is moved of each array, by its number, and of shared memory as -1.
        An array has a buffer of its exact size; one of NaN alone counts as one that nobody has written. `order` is forward,
        backward or a seed.
        """
        library = ctypes.CDLL(str(image))
        module = _Module.in_dll(library, "simt_module")
        kernel = next(k for k in module.kernels[: module.count] if k.name.decode() == name)
        assert kernel.parameters == len(arguments), (name, kernel.parameters, len(arguments))
        sizes = kernel.sizes[: kernel.parameters]
        placed: list[tuple[np.ndarray, int]] = []
        cells: list[Any] = [None] * len(arguments)
        for number, (value, size) in enumerate(zip(arguments, sizes, strict=True)):
            if isinstance(value, np.ndarray):
                address = self._place(value, is_constant=number in constants)
                placed.append((value, address))
                cells[number] = ctypes.c_uint64(address)
            elif not isinstance(value, Same):
                cells[number] = {4: ctypes.c_int32, 8: ctypes.c_int64}[size](value)
        for number, value in enumerate(arguments):
            if isinstance(value, Same):
                cells[number] = cells[value.as_argument]
        pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        lib = self._lib
        lib.simt_clear()
        mode = {"forward": 0, "backward": 1}.get(str(order), 2)
        lib.simt_configure(mode, order if isinstance(order, int) else 0)
        lib.simt_count_traffic(traffic is not None)
        lib.simt_launch(
            ctypes.byref(module), ctypes.byref(kernel), _Dims(*grid), _Dims(*block), ctypes.c_size_t(shared_bytes), pointers
        )  # fmt: skip
        if traffic is not None:
            addresses = {
                n: cell.value
                for n, cell in enumerate(cells)
                if isinstance(arguments[n], np.ndarray)
            }
            traffic |= {n: self._traffic(address) for n, address in ({-1: 0} | addresses).items()}
            lib.simt_count_traffic(0)
        for array, address in placed:
            ctypes.memmove(array.ctypes.data, address, array.nbytes)
            lib.simt_free(ctypes.c_void_p(address))
        reports = lib.simt_reports().decode().splitlines()
        return [_explain(line, image, _base(image)) for line in reports]

    def _traffic(self, address: int) -> Traffic:
        words = (ctypes.c_uint64 * 4)()
        self._lib.simt_traffic(ctypes.c_void_p(address), words)
        return Traffic(*words)

    def _place(self, value: np.ndarray, *, is_constant: bool) -> int:
        size = ctypes.c_size_t(value.nbytes)
        address = self._lib.simt_alloc(size)
        ctypes.memmove(address, value.ctypes.data, value.nbytes)
        if value.dtype.kind == "f" and np.isnan(value).all():
            return address
        self._lib.simt_mark(ctypes.c_void_p(address), size)
        if is_constant:
            self._lib.simt_protect(ctypes.c_void_p(address))
        return address


def _base(image: Path) -> int:
    """Return where an image lies in this process."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    starts = (int(line.split("-")[0], 16) for line in maps if line.endswith(str(image)))
    return min(starts, default=0)


def _explain(report: str, image: Path, base: int) -> str:
    """Return a finding with its line of the CUDA text, seen through inlined helpers."""
    kind, pc, text = report.split("|", 2)
    where = int(pc, 16) - base - 1
    if where <= 0:
        return f"{kind}: {text}"
    command = ["addr2line", "-i", "-e", str(image), hex(where)]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    frames = [line.split("/")[-1].split(" ")[0] for line in found if "kernel.cu:" in line]
    return f"{kind}: {text}" + (f" [{frames[-1]}]" if frames else "")
