"""Machine code that is kept: the same bytes as compiled, never used for anything else, never used when damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tvm
from tvm.tirx import PrimFunc

from q35c.codegen.calls import Call, Int, Nt, Pointer, Tid, Tokens
from q35c.codegen.cpu import build
from q35c.codegen.cpu import object_key as object_key_module
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.isa.x86 import V3, V4, V4_BF16
from q35c.codegen.cpu.kernels.rows.norm import rms_norm
from q35c.codegen.cpu.object_key import object_key
from q35c.codegen.cpu.program import kernel_symbol, program_entry
from q35c.codegen.cpu.support import support_ir
from q35c.user_cache import SWITCH

WIDTH, EPSILON = 64, 1e-6


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder of kept objects, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(SWITCH, raising=False)
    return tmp_path / "q35c" / "objects"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """Return what tells the symbols that were compiled since it was last asked."""
    log = tmp_path / "compiled"  # a file: objects are compiled in a child process
    compile_members = build._build

    def logged(members: dict[str, PrimFunc], isa: Isa) -> tvm.runtime.Module:
        with log.open("a") as file:
            file.writelines(f"{name}\n" for name in members)
        return compile_members(members, isa)

    def ask() -> list[str]:
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    monkeypatch.setattr(build, "_build", logged)
    return ask


def shared_object(epsilon: float = EPSILON, isa: Isa = V3, width: int = WIDTH) -> bytes:
    x, y = Pointer("io", 0), Pointer("arena", 0)
    call = Call(
        "norm", (x, Pointer("weights", 0), y, Tokens(), Int(width), Int(width), Tid(), Nt())
    )
    entries = {"run": program_entry("run", [call])}
    return build.build_shared({"norm": rms_norm(width, epsilon, 1.0, isa)}, entries, isa)


def test_kept_objects_give_the_same_bytes(
    kept: Path, compiled: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "off")
    want = shared_object()
    assert not kept.exists()
    monkeypatch.setenv(SWITCH, "on")
    assert shared_object() == want
    assert len(os.listdir(kept)) == 3  # the program, the kernel, the helpers
    assert compiled()
    assert shared_object() == want
    assert not compiled()


def test_what_changed_is_compiled_and_nothing_else(
    kept: Path, compiled: Callable[[], list[str]]
) -> None:
    shared_object()
    compiled()
    shared_object(epsilon=1e-5)
    assert compiled() == [kernel_symbol("norm")]


def test_damaged_objects_are_not_linked(kept: Path, compiled: Callable[[], list[str]]) -> None:
    want = shared_object()
    for path in kept.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    first = compiled()
    assert shared_object() == want
    assert sorted(compiled()) == sorted(first)
    assert shared_object() == want
    assert not compiled()  # the damaged ones were replaced


def test_a_cache_that_cannot_be_made_is_no_error(kept: Path) -> None:
    kept.parent.write_text("in the way")
    assert shared_object().startswith(b"\x7fELF")
    assert kept.parent.read_text() == "in the way"


def key(
    epsilon: float = EPSILON,
    isa: Isa = V3,
    symbol: str = "norm",
    support: str = "",
    recipe: str = "",
) -> str:
    function = rms_norm(WIDTH, epsilon, 1.0, V3).with_attr("global_symbol", symbol)
    return object_key({symbol: function}, support, build._target(isa), recipe)


def test_the_key_holds_all_that_decides_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    next_epsilon = EPSILON * (1 + 2**-52)
    keys = [
        key(), key(next_epsilon), key(isa=V4), key(isa=V4_BF16), key(symbol="other"), key(support="x"), key(recipe="x")
    ]  # fmt: skip
    assert key() == keys[0]
    monkeypatch.setattr(object_key_module, "_compiler", lambda: "another TVM")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_the_support_text_is_part_of_the_key(
    kept: Path, compiled: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_object()
    first = compiled()
    monkeypatch.setattr(build, "support_ir", lambda isa: support_ir(isa) + "\n; a comment")
    shared_object()
    assert sorted(compiled()) == sorted(first)
