"""CUDA text to an image for an architecture, by NVRTC of the extra `cuda` or by nvcc, and what ptxas says of each kernel.

Neither gets fast math, which would flush denormals and take approximations for divisions and roots. The same text gives the
same image, whether it is compiled or was kept from an earlier compilation.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q35c.codegen.child import tool_failed
from q35c.codegen.cuda.nvrtc import find_wheels
from q35c.errors import InternalError, ToolchainError
from q35c.temporary import system_directory, temporary_folder
from q35c.user_cache import private_folder

# Who makes images that no compiler of CUDA makes, by architecture: the tests, for their emulated driver.
MAKERS: dict[str, Callable[[str], bytes]] = {}
_FOLDER, _TEXT, _CUBIN = "q35c-cuda-", "kernels.cu", "kernels.cubin"
_KEPT = "images"  # in the user's cache directory
_RECIPE = "1"  # of what is kept
_ENTRY = re.compile(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", re.DOTALL)
_FIGURES = {
    "registers": r"Used (\d+) registers",
    "spill_bytes": r"(\d+) bytes spill stores",
    "stack_bytes": r"(\d+) bytes stack frame",
    "shared_bytes": r"(\d+) bytes smem",
}


@dataclass(frozen=True, slots=True)
class Image:
    """The code of all kernels, and ptxas' figures by symbol; none of an emulated image."""

    code: bytes
    figures: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Compiler:
    """A program that compiles the text in a folder; `identity` changes with its version."""

    name: str
    identity: str
    command: Callable[
        [str], list[str]
    ]  # architecture -> command, in the folder, text on standard input


def check_tools(architectures: Sequence[str]) -> None:
    """Raise ToolchainError, before minutes of work, where an image cannot be made."""
    for architecture in architectures:
        if architecture not in MAKERS:
            find_compiler()


def make_image(text: str, architecture: str, symbols: Sequence[str]) -> Image:
    """Compile CUDA text, or take what was kept of it. Raises ToolchainError."""
    if architecture in MAKERS:
        return Image(MAKERS[architecture](text), {})
    compiler = find_compiler()
    parts = (_RECIPE, compiler.identity, architecture, text)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    with private_folder(_KEPT) as kept:
        data = kept.load(key) if kept else None
        if data is None:
            cubin, log = run_compiler(compiler, text, architecture)
            said = log.encode()
            data = len(said).to_bytes(8, "little") + said + cubin
            if kept:
                kept.store(key, data)
    end = 8 + int.from_bytes(data[:8], "little")
    figures = figures_of(data[8:end].decode(errors="replace"))
    if missing := set(symbols) - set(figures):
        raise InternalError("the compiler says nothing of some kernels", where=compiler.name, got=sorted(missing))  # fmt: skip
    return Image(data[end:], figures)


def run_compiler(compiler: Compiler, text: str, architecture: str) -> tuple[bytes, str]:
    """Return the cubin and what the compiler says. Raises ToolchainError."""
    with temporary_folder(system_directory(), _FOLDER) as folder:
        try:
            (folder / _TEXT).write_text(text)
            command = compiler.command(architecture)
            done = subprocess.run(command, cwd=folder, input=text, text=True, capture_output=True)
            if done.returncode:
                said = done.stderr or done.stdout
                raise tool_failed(compiler.name, folder, done.returncode, said)
            return (folder / _CUBIN).read_bytes(), done.stdout + done.stderr
        except OSError as error:
            where = str(folder.parent)
            raise ToolchainError(f"cannot run {compiler.name}", where=where, got=error.strerror) from None  # fmt: skip


@functools.cache
def find_compiler() -> Compiler:
    """Return the compiler of CUDA on this machine. Raises ToolchainError."""
    if (root := find_wheels()) is not None:
        library = next((root / "lib").glob("libnvrtc-builtins.so.13.*"))
        return Compiler("NVRTC", library.name, functools.partial(_nvrtc_command, root))
    if nvcc := shutil.which("nvcc"):
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        return Compiler("nvcc", version.stdout, functools.partial(_nvcc_command, nvcc))
    raise ToolchainError(
        "no compiler of CUDA was found",
        expected="NVRTC of the extra `cuda`, or nvcc on PATH",
        hint='pip install "q35c[cuda]"',
    )


def _nvrtc_command(root: Path, architecture: str) -> list[str]:
    return [sys.executable, "-m", "q35c.codegen.cuda.nvrtc", str(root), architecture, _CUBIN]


def _nvcc_command(nvcc: str, architecture: str) -> list[str]:
    options = ["-O3", "-w", "-std=c++17", "-Xptxas", "-v", "-o", _CUBIN]
    return [nvcc, "-cubin", f"-arch={architecture}", *options, _TEXT]


def figures_of(log: str) -> dict[str, dict[str, Any]]:
    """Return what `ptxas -v` says of each kernel, by symbol."""
    return {
        symbol: {
            name: int(match[1]) if (match := re.search(pattern, said)) else 0
            for name, pattern in _FIGURES.items()
        }
        for symbol, said in _ENTRY.findall(log)
    }
