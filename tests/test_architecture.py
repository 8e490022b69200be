"""The house rules that a machine can see: who may import whom, file sizes, a lean `import q35c`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "q35c"
MAX_LINES = 400
LEAN_MIB = 60

BASE = {
    "arguments",
    "cpuinfo",
    "errors",
    "outputs",
    "temporary",
    "user_cache",
    "limits",
    "fields",
    "strictjson",
    "config",
    "vision_config",
    "version",
    "__version__",
}
KERNELS = {"layouts", "formats", "codegen.calls", "codegen.cpu.isa", "codegen.cpu.kernels", "tvm"}
CPU = "codegen.cpu.kernels"
# Room -> other rooms of q35c and other packages that its modules may import, wherever they do. A folder is a room of its own
# where it is listed, and so is a file; a room does not include those that are listed below it.
ROOMS: dict[str, set[str]] = {
    "base": set(),
    "formats": {"numpy"},
    "layouts": {"formats"},
    "ir": {"formats", "numpy"},
    "passes": {"ir", "formats"},
    # What a checkpoint brings is checked by what will read it.
    "frontend": {
        "ir", "numpy", "torch", "transformers", "safetensors", "huggingface_hub", "runtime.tokenizer", "runtime.chat",
        "vision.files", "vision.parameters",
    },
    "codegen": {"ir", "formats", "layouts", "artifact", "codegen.calls", "numpy"},
    "codegen.calls": {"layouts"},
    "codegen.targets": {"codegen", "codegen.cpu.backend", "codegen.cuda.backend"},
    "codegen.cpu": {
        "codegen", "codegen.calls", "codegen.cpu.backend", "codegen.cpu.isa", "codegen.cpu.kernels", f"{CPU}.rows", f"{CPU}.products", f"{CPU}.linear",
        f"{CPU}.experts", f"{CPU}.attention", f"{CPU}.delta", "ir", "formats", "layouts", "numpy", "tvm", "tvm_ffi",
    },
    "codegen.cpu.backend": {
        "codegen", "codegen.calls", "codegen.cpu", "codegen.cpu.isa", CPU, f"{CPU}.rows", "ir", "formats", "layouts",
    },
    "codegen.cuda": {
        "codegen", "codegen.calls", "codegen.cuda.backend", "codegen.cuda.kernels", "artifact", "ir", "formats", "layouts", "tvm", "tvm_ffi",
    },
    "codegen.cuda.backend": {"codegen", "codegen.calls", "codegen.cuda", "artifact", "ir", "formats", "layouts"},
    "codegen.cuda.kernels": {"layouts", "formats", "codegen.calls", "artifact", "tvm"},
    "codegen.cpu.isa": {"numpy", "tvm", CPU},
    CPU: KERNELS,
    f"{CPU}.rows": KERNELS,
    f"{CPU}.products": {f"{CPU}.rows", *KERNELS},
    f"{CPU}.linear": {f"{CPU}.rows", f"{CPU}.products", *KERNELS},
    f"{CPU}.experts": {f"{CPU}.rows", f"{CPU}.products", *KERNELS},
    f"{CPU}.attention": {f"{CPU}.rows", *KERNELS},
    f"{CPU}.delta": {f"{CPU}.rows", *KERNELS},
    "export": {"ir", "passes", "frontend", "numpy", "onnx"},
    "artifact": {"layouts", "numpy", "safetensors", "vision.parameters"},
    "runtime": {
        "artifact", "layouts", "numpy", "tokenizers", "jinja2", "markupsafe", "llguidance", "runtime.chat",
        "runtime.tokenizer", "runtime.targets", "vision", "vision.parameters",
    },
    "vision": {"vision.parameters", "numpy", "PIL", "av"},
    "vision.parameters": set(),
    "vision.files": {"vision.parameters"},
    "runtime.targets": {"runtime", "runtime.cpu", "runtime.cuda", "artifact"},
    "runtime.cpu": {"runtime", "artifact", "layouts", "numpy"},
    "runtime.cuda": {"runtime", "artifact", "layouts", "numpy"},
    "runtime.chat": {"runtime", "jinja2", "markupsafe", "numpy"},
    "runtime.tokenizer": {"runtime", "tokenizers"},
    "serve": {
        "runtime", "runtime.chat", "runtime.tokenizer", "artifact", "vision", "numpy", "starlette", "uvicorn", "h11",
        "prometheus_client",
    },
}  # fmt: skip
# The roof: it calls every room, but imports only these before a command needs more.
ROOF = {
    "__init__",
    "__main__",
    "bench",
    "cli",
    "demo",
    "progress",
    "roofline",
    "verify",
    "verify_pictures",
}
LEAN_AT_IMPORT = {"numpy", "click", "artifact", "layouts", "load"} | ROOF
DRIVER = {"compile"}  # the spine names them all
HEAVY = (
    "torch", "transformers", "tvm", "tvm_ffi", "safetensors", "onnx", "huggingface_hub", "PIL", "av",
)  # fmt: skip


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(name: str) -> str:
    """Return the room of a module by its name below q35c: the longest one listed that holds it."""
    parts = name.split(".")
    if parts[0] in BASE:
        return "base"
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in ROOMS), parts[0])


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(tree: ast.AST, skip: Callable[[ast.AST], bool]) -> Iterator[str]:
    """Yield imported names in dotted form, those of `from x import y` as `x.y`, but those within what is to be skipped."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not skip(node):
            yield from imports_of(node, skip)


def is_nothing(node: ast.AST) -> bool:
    return False


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def is_lazy(node: ast.AST) -> bool:
    """Say whether an import below a node happens later than that of its file, or never."""
    return isinstance(node, ast.FunctionDef) or is_type_checking(node)


def forbidden_imports(source: str, room: str) -> list[str]:
    """Return what a module in that room imports against the arrows."""
    is_roof = room in ROOF
    allowed = LEAN_AT_IMPORT if is_roof else ROOMS[room] | {room}
    names = imports_of(ast.parse(source), is_lazy if is_roof else is_nothing)
    return [name for name in names if not is_allowed(name, allowed)]


def is_allowed(name: str, allowed: set[str]) -> bool:
    top, _, rest = name.partition(".")
    if top in sys.stdlib_module_names or name == "q35c":
        return True
    if top != "q35c":
        return top in allowed
    files = allowed - ROOMS.keys()  # of rooms that are closed otherwise
    is_file = any(rest == file or rest.startswith(file + ".") for file in files)
    return is_file or room_of(rest) in allowed | {"base"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = room_of(name_of(path))
    if room in DRIVER:
        return
    assert room in ROOMS or room in ROOF, f"{room} is not in the table of rooms"
    assert forbidden_imports(path.read_text(), room) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("runtime", "import torch"),
        ("runtime", "def f():\n    from q35c.codegen.targets import find_target"),
        ("runtime", "from q35c import ir"),
        ("runtime", "from q35c.runtime.cpu.library import Workers"),
        ("runtime.cpu", "from q35c.runtime.targets import find_machine"),
        ("runtime.cuda", "from q35c.runtime.cpu.blocks import Region"),
        ("ir", "from q35c.artifact import layout"),
        ("passes", "import numpy as np"),
        ("codegen", "from q35c.passes.pipeline import fuse"),
        ("codegen", "import tvm"),
        ("codegen", "from q35c.codegen.cpu.isa.base import Isa"),
        ("codegen", "from q35c.codegen import cpu"),
        ("codegen.targets", "from q35c.codegen.cpu.build import build_shared"),
        ("codegen.cpu.kernels.attention", "from q35c.codegen.cpu.kernels.products import product"),
        ("codegen.cpu.kernels.rows", "from q35c.codegen.cpu.families import FAMILIES"),
        ("layouts", "from q35c.codegen.cpu.isa.x86 import V3"),
        ("runtime", "from q35c.serve.request import Request"),
        ("serve", "from q35c.compile import compile_model"),
        ("serve", "from q35c.runtime.cpu.library import Workers"),
        ("cli", "from q35c.compile import compile_model"),
        ("base", "from q35c.ir import Graph"),
    ],
)
def test_an_arrow_against_the_table_is_found(room: str, source: str) -> None:
    assert forbidden_imports(source, room)


def module_of(name: str, known: Collection[str]) -> str:
    """Return which of the known files an import below q35c reads, as a name of something within it or its own."""
    parts = name.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in known), "__init__")


def order_of(sources: Mapping[str, str]) -> list[str]:
    """Return files below q35c by name, each behind those that it imports, wherever it does. Raises CycleError."""
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        found = imports_of(ast.parse(source), is_type_checking)
        own = (module.partition(".")[2] for module in found if module.split(".")[0] == "q35c")
        graph[name] = {module_of(module, sources) for module in own} - {name}
    return list(TopologicalSorter(graph).static_order())


def test_no_file_imports_itself_by_way_of_others() -> None:
    sources = {name_of(path): path.read_text() for path in modules()}
    order = order_of(sources)
    assert order.index("errors") < order.index("runtime.session") < order.index("__init__")
    sources["errors"] += "def f():\n    from q35c.runtime import Session\n"
    with pytest.raises(CycleError):
        order_of(sources)


def test_no_file_is_too_long() -> None:
    tracked = [*modules(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    tracked += (ROOT / "scripts").rglob("*.py")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in tracked}
    assert {name: length for name, length in lengths.items() if length >= MAX_LINES} == {}


# Every module a user of a finished artifact needs; the peak is that of this process alone (VmHWM).
_LEAN_PROGRAM = f"""
import sys
import q35c
{{more}}
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
assert peak <= {LEAN_MIB}, f"{{{{peak}}}} MiB"
"""


@pytest.mark.parametrize("more", ["", "import q35c.cli", "import q35c.runtime, q35c.bench"])
def test_import_is_lean(more: str) -> None:
    program = _LEAN_PROGRAM.format(more=more)
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
