"""Machine code that is kept: the same bytes as compiled, never used for anything else, never used when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tvm
from tvm.tirx import PrimFunc

from q35c.codegen import build
from q35c.codegen.isa.x86 import V3, V4, V4_BF16, Isa
from q35c.codegen.kernels.norm import rms_norm
from q35c.codegen.object_key import object_key
from q35c.codegen.program import Call, Int, Nt, Pointer, Tid, Tokens, program_entry
from q35c.user_cache import SWITCH

WIDTH, EPSILON = 64, 1e-6


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder of kept objects, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(SWITCH, raising=False)
    return tmp_path / "q35c" / "objects"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of objects as they are compiled."""
    names: list[str] = []
    compile_members = build._build

    def counted(members: dict[str, PrimFunc], isa: Isa) -> tvm.runtime.Module:
        names.extend(members)
        return compile_members(members, isa)

    monkeypatch.setattr(build, "_build", counted)
    return names


def shared_object(epsilon: float = EPSILON, isa: Isa = V3, width: int = WIDTH) -> bytes:
    x, y = Pointer("io", 0), Pointer("arena", 0)
    call = Call(
        "norm", (x, Pointer("weights", 0), y, Tokens(), Int(width), Int(width), Tid(), Nt())
    )
    entries = {"run": program_entry("run", [call])}
    return build.build_shared({"norm": rms_norm(width, epsilon, 1.0, isa)}, entries, isa)


def test_kept_objects_give_the_same_bytes(
    kept: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "off")
    want = shared_object()
    assert not kept.exists()
    monkeypatch.setenv(SWITCH, "on")
    assert shared_object() == want
    assert len(os.listdir(kept)) == 3  # the program, the kernel, the helpers
    compiled.clear()
    assert shared_object() == want
    assert not compiled


def test_what_changed_is_compiled_and_nothing_else(kept: Path, compiled: list[str]) -> None:
    shared_object()
    compiled.clear()
    assert shared_object(epsilon=1e-5)
    assert len(compiled) == 1 and "norm" in compiled[0]


def test_damaged_objects_are_not_linked(kept: Path, compiled: list[str]) -> None:
    want = shared_object()
    for path in kept.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    count = len(compiled)
    assert shared_object() == want
    assert len(compiled) == 2 * count
    assert shared_object() == want
    assert len(compiled) == 2 * count  # the damaged ones were replaced


def test_a_cache_that_cannot_be_made_is_no_error(kept: Path) -> None:
    kept.parent.write_text("in the way")
    assert shared_object().startswith(b"\x7fELF")
    assert kept.parent.read_text() == "in the way"


def key(
    epsilon: float = EPSILON, isa: Isa = V3, symbol: str = "norm", support: str = "",
    recipe: Path = Path(build.__file__),
) -> str:  # fmt: skip
    function = rms_norm(WIDTH, epsilon, 1.0, V3).with_attr("global_symbol", symbol)
    return object_key({symbol: function}, support, build._target(isa), recipe)


def test_the_key_holds_all_that_decides_the_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = tmp_path / "passes.py"
    recipe.write_text("one pass less")
    next_epsilon = EPSILON * (1 + 2**-52)
    keys = [
        key(), key(next_epsilon), key(isa=V4), key(isa=V4_BF16), key(symbol="other"), key(support="x"), key(recipe=recipe)
    ]  # fmt: skip
    recipe = tmp_path / "the same version of other passes.py"
    recipe.write_text("two passes less")
    keys.append(key(recipe=recipe))
    monkeypatch.setattr(tvm, "__version__", "0.0.0")
    recipe = tmp_path / "another version.py"
    recipe.write_text("one pass less")
    keys.append(key(recipe=recipe))
    assert len(set(keys)) == len(keys)


def test_the_support_text_is_part_of_the_key(
    kept: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_object()
    count = len(compiled)
    monkeypatch.setattr(build, "SUPPORT_IR", build.SUPPORT_IR + "\n; a comment")
    shared_object()
    assert len(compiled) == 2 * count
