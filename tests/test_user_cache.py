"""The user's cache: kept bytes come back whole or not at all, from a folder that is nobody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from q35c.errors import OptionError
from q35c.user_cache import SWITCH, PrivateFolder, cache_directory, private_folder

DATA = bytes(range(256)) * 9
needs_a_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return where the folder `objects` lies, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(SWITCH, raising=False)
    return tmp_path / "q35c" / "objects"


@pytest.fixture
def folder(place: Path) -> Iterator[PrivateFolder]:
    with private_folder("objects") as folder:
        assert folder is not None
        yield folder


def is_usable() -> bool:
    with private_folder("objects") as folder:
        return folder is not None


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_directory() == Path("/home/someone/.cache/q35c")


def test_what_is_kept_comes_back(folder: PrivateFolder, place: Path) -> None:
    assert folder.load("one") is None
    folder.store("one", DATA)
    folder.store("two", b"")
    assert (folder.load("one"), folder.load("two")) == (DATA, b"")
    folder.store("one", b"other")
    assert folder.load("one") == b"other"
    assert sorted(os.listdir(place)) == ["one", "two"]
    assert place.stat().st_mode & 0o777 == 0o700
    assert (place / "one").stat().st_mode & 0o777 == 0o600


def test_every_damage_is_seen(folder: PrivateFolder, place: Path) -> None:
    folder.store("one", b"machine code")
    whole = (place / "one").read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (place / "one").write_bytes(damaged)
        assert folder.load("one") is None, bit
    for size in range(len(whole)):
        (place / "one").write_bytes(whole[:size])
        assert folder.load("one") is None, size
    (place / "one").write_bytes(whole + b"\0")
    assert folder.load("one") is None
    (place / "one").write_bytes(whole)
    assert folder.load("one") == b"machine code"


def test_an_entry_does_not_serve_under_another_name(folder: PrivateFolder, place: Path) -> None:
    folder.store("one", DATA)
    (place / "one").rename(place / "two")
    assert folder.load("two") is None


def test_only_private_files_are_read(folder: PrivateFolder, place: Path, tmp_path: Path) -> None:
    folder.store("one", DATA)
    for mode in (0o620, 0o602, 0o000):
        (place / "one").chmod(mode)
        assert folder.load("one") is None or (mode == 0 and os.geteuid() == 0), oct(mode)
    (place / "one").chmod(0o600)
    (place / "one").rename(tmp_path / "elsewhere")
    (place / "one").symlink_to(tmp_path / "elsewhere")
    assert folder.load("one") is None
    (place / "one").unlink()
    os.mkfifo(place / "one")
    assert folder.load("one") is None  # and does not wait for a writer
    (place / "one").unlink()
    (place / "one").mkdir()
    assert folder.load("one") is None
    folder.store("one", DATA)  # cannot: nothing is left behind
    assert os.listdir(place) == ["one"]


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_write_to_is_not_used(place: Path, mode: int) -> None:
    assert is_usable()
    place.chmod(mode)
    assert not is_usable()


def test_what_is_not_a_folder_of_ours_is_not_used(place: Path, tmp_path: Path) -> None:
    place.parent.mkdir()
    (tmp_path / "theirs").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "theirs")
    assert not is_usable()
    place.unlink()
    place.write_text("a file")
    assert not is_usable()
    place.unlink()
    place.parent.rmdir()
    place.parent.write_text("a file")
    assert not is_usable()


def test_a_folder_of_another_user_is_not_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_usable()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not is_usable()


@needs_a_user
def test_an_unwritable_place_is_no_error(place: Path) -> None:
    with private_folder("objects") as folder:
        assert folder is not None
        folder.store("one", DATA)
    place.chmod(0o500)
    with private_folder("objects") as folder:
        assert folder is not None
        folder.store("two", DATA)
        assert (folder.load("one"), folder.load("two")) == (DATA, None)
    place.chmod(0o700)
    (place / "one").unlink()
    place.rmdir()
    place.parent.chmod(0o500)
    assert not is_usable()
    place.parent.chmod(0o700)


def test_a_full_disk_leaves_nothing(
    folder: PrivateFolder, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    folder.store("one", DATA)
    assert os.listdir(place) == []


def test_the_switch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert not is_usable() and not place.exists()
    monkeypatch.setenv(SWITCH, "on")
    assert is_usable()
    monkeypatch.setenv(SWITCH, "0")
    with pytest.raises(OptionError, match=SWITCH):
        is_usable()


def test_the_least_recently_used_go_first(folder: PrivateFolder, place: Path) -> None:
    names = [f"entry{i}" for i in range(6)]
    for when, name in enumerate(names):
        folder.store(name, DATA)
        os.utime(place / name, (when, when))
    assert folder.load(names[0]) == DATA  # used again: now the latest
    size = (place / names[0]).stat().st_size
    folder.trim(6 * size)
    assert len(os.listdir(place)) == 6
    folder.trim(3 * size)
    assert sorted(os.listdir(place)) == [names[0], names[4], names[5]]
    folder.trim(3 * size - 1)
    assert sorted(os.listdir(place)) == [names[0], names[5]]


KILLED = """
import os
from q35c.user_cache import private_folder
os.rename = lambda *_, **__: os.kill(os.getpid(), 9)
with private_folder("objects") as folder:
    folder.store("one", b"x" * 1000)
"""


def test_a_kill_leaves_no_entry(place: Path) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert child.returncode == -9
    with private_folder("objects") as folder:
        assert folder is not None and folder.load("one") is None
        assert len(os.listdir(place)) == 1
        folder.store("two", DATA)
        folder.trim(len(DATA) + 100)
        assert os.listdir(place) == ["two"]
