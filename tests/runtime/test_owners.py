"""What a load takes is given back: descriptors, code and weights in memory, threads."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import q35c
from q35c.errors import ArtifactError, ExecutionError, InputError, OptionError
from q35c.runtime.cpu import library as library_module
from q35c.runtime.cpu.library import Library
from tests.fake_artifact import write_fake

TIMES = 5


def count_mappings() -> int:
    """Return how many pieces of artifacts and their code are mapped here."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("q35c" in line for line in lines)


def taken() -> tuple[int, int, int]:
    """Return the numbers of descriptors, of our mappings and of our threads."""
    gc.collect()  # what other tests left
    for _ in range(200):  # worker threads end soon after they are told
        threads = sum(thread.name.startswith("q35c") for thread in threading.enumerate())
        if not threads:
            break
        time.sleep(0.01)
    gc.collect()
    return len(os.listdir("/proc/self/fd")), count_mappings(), threads


def repeat(act: Callable[[], object]) -> None:
    act()  # pays for what every load takes once
    before = taken()
    for _ in range(TIMES):
        act()
    assert taken() == before


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("owners") / "model.q35c"
    write_fake(path)
    return path


@pytest.mark.parametrize("mmap", [True, False])
def test_a_closed_model_leaves_nothing(path: Path, mmap: bool) -> None:
    def act() -> None:
        with q35c.load(path, threads=2, mmap=mmap) as model, model.session() as session:
            session.prefill([1, 2, 3])
            session.decode(4)

    repeat(act)


def test_a_model_that_nobody_closed_leaves_nothing(path: Path) -> None:
    repeat(lambda: q35c.load(path, threads=2).session().prefill([1, 2]))


def test_code_goes_with_close_and_not_with_the_last_reference(path: Path) -> None:
    before = taken()
    model = q35c.load(path, threads=2)
    session = model.session()
    session.prefill([1])
    assert count_mappings() > before[1]
    model.close()
    assert taken() == before
    with pytest.raises(OptionError, match="closed"):
        session.decode(1)


def test_loads_that_fail_leave_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    damaged = tmp_path / "damaged.q35c"
    damaged.write_bytes(data)
    codeless = tmp_path / "codeless.q35c"
    write_fake(codeless, with_code=False)

    def refused(error: type[Exception], path: Path, **options: object) -> None:
        with pytest.raises(error):
            q35c.load(path, **options)

    repeat(lambda: refused(ArtifactError, damaged, threads=1))
    repeat(lambda: refused(ExecutionError, codeless, threads=1))
    repeat(lambda: refused(OptionError, path, threads=0))
    repeat(lambda: refused(ArtifactError, tmp_path / "absent"))

    def no_entry(self: Library, symbol: str) -> None:
        raise ExecutionError("the compiled code lacks an entry", expected=symbol)

    monkeypatch.setattr(Library, "entry", no_entry)
    repeat(lambda: refused(ExecutionError, path, threads=1))


def test_code_without_proc(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = taken()

    def without_proc(_path: str) -> None:
        raise OSError("cannot open shared object file: No such file or directory")

    monkeypatch.setattr(library_module.ctypes, "CDLL", without_proc)
    monkeypatch.setattr(os.path, "isdir", lambda _path: False)
    with pytest.raises(InputError, match="without /proc"):
        Library(b"code")
    monkeypatch.undo()
    assert taken() == before
