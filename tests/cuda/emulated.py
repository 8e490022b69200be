"""The emulated driver: built once, opened by the runtime through Q35C_LIBCUDA, made to fail on demand."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from q35c.user_cache import cache_directory

HERE = Path(__file__).parent
DRIVER = HERE / "driver"
_FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wl,-Bsymbolic")
# What a model takes of a device: none may be left when it is closed.
TAKEN = (
    "bytes", "context", "memory", "pinned", "address", "physical", "stream", "graph", "executable", "event", "module",
)  # fmt: skip


def shared_object(sources: Sequence[Path], defines: Sequence[str] = ()) -> Path:
    """Return C++ files as one shared object, kept from an earlier run if all is the same. Skips where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    headers = [DRIVER / "machine.h", HERE.parent / "fake_model.h"]
    parts = [*(path.read_bytes() for path in (*sources, *headers)), *map(str.encode, defines)]
    key = hashlib.sha256(b"\0".join([*parts, *map(str.encode, _FLAGS)])).hexdigest()
    path = cache_directory() / "emulated" / f"{key[:24]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [compiler, *_FLAGS, *defines, "-o", unfinished, *sources, "-ldl"], check=True
        )
        os.replace(unfinished, path)
    return path


@functools.cache
def host_driver() -> Path:
    """Return the emulated driver over a machine whose kernels are written for the host."""
    return shared_object([DRIVER / "driver.cpp", DRIVER / "host_machine.cpp"])


class Emulated:
    """The hands on an emulated driver that is loaded in this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        for name in ("findings", "calls", "live"):
            getattr(self._library, f"fakecuda_{name}").restype = ctypes.c_char_p

    def fail(self, function: str, number: int, code: int) -> None:
        """Have the nth call of a function from now on fail, or every one for 0."""
        self._library.fakecuda_fail(f"{function}:{number}:{code}".encode())

    def watch(self) -> None:
        """Count calls from now on; none fails."""
        self._library.fakecuda_fail(b"")

    def calls(self) -> dict[str, int]:
        """Return how often each function was called since the last `fail` or `watch`."""
        return _table(self._library.fakecuda_calls())

    def live(self) -> dict[str, int]:
        """Return what is taken, and how many launches and graphs were run."""
        return _table(self._library.fakecuda_live())

    def taken(self) -> dict[str, int]:
        """Return what is taken and was not given back."""
        return {name: count for name, count in self.live().items() if name in TAKEN and count}

    def findings(self) -> list[str]:
        """Return what the machine has found."""
        return self._library.fakecuda_findings().decode().splitlines()

    def recover(self) -> None:
        """Forget failures, findings and what is taken, as if the process began anew."""
        self._library.fakecuda_recover()


def _table(text: bytes) -> dict[str, int]:
    pairs = (line.split("=") for line in text.decode().splitlines())
    return {name: int(count) for name, count in pairs}
