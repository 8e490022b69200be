"""NVRTC through ctypes, in a process of its own: `python -m q35c.codegen.cuda.nvrtc ROOT ARCHITECTURE OUT` reads CUDA text.

It writes the cubin to OUT and what the compiler says, ptxas' figures included, to standard output.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

_NAME = b"kernels.cu"  # constant, so that no path comes into a cubin


def find_wheels() -> Path | None:
    """Return the directory of the extra `cuda` with NVRTC and its headers, None if it is not installed."""
    found = importlib.util.find_spec("nvidia")
    for place in found.submodule_search_locations or () if found else ():
        root = Path(place) / "cu13"
        if (root / "lib/libnvrtc.so.13").exists() and (root / "include/cuda_bf16.h").exists():
            return root
    return None


class Nvrtc:
    """The compiler of a directory of wheels."""

    def __init__(self, root: Path) -> None:
        libraries = root / "lib"
        # NVRTC itself would look for these in the loader's path only.
        for builtins in libraries.glob("libnvrtc-builtins.so.13.*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(libraries / "libnvrtc.so.13"))
        self._includes = (root / "include", root / "include/cccl")

    def compile(self, text: str, architecture: str) -> tuple[bytes, str]:
        """Return the cubin and the log. Raises RuntimeError with the log."""
        options = [
            f"--gpu-architecture={architecture}", "--std=c++17", "--fmad=true", "--ptxas-options=-v",
            *(f"-I{path}" for path in self._includes),
        ]  # fmt: skip
        program = ctypes.c_void_p()
        source = text.replace("#include <cuda.h>", "").encode()
        self._call(program, "CreateProgram", ctypes.byref(program), source, _NAME, 0, None, None)
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        self._call(program, "CompileProgram", program, len(options), words)
        return self._get(program, "CUBIN"), self._log(program)

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(program, f"Get{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(program, f"Get{what}", program, data)
        return data.raw

    def _log(self, program: ctypes.c_void_p) -> str:
        return self._get(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")

    def _call(self, program: ctypes.c_void_p, name: str, *arguments: object) -> None:
        if code := getattr(self._library, f"nvrtc{name}")(*arguments):
            log = self._log(program) if name == "CompileProgram" else ""
            raise RuntimeError(f"nvrtc{name} returned {code}\n{log}")


def main() -> None:
    root, architecture, out = sys.argv[1:]
    try:
        cubin, log = Nvrtc(Path(root)).compile(sys.stdin.read(), architecture)
    except RuntimeError as error:
        sys.exit(str(error))
    Path(out).write_bytes(cubin)
    print(log)


if __name__ == "__main__":
    main()
