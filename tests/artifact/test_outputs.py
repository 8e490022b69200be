"""Names that no file can be published at are refused before the work; what stands there is not lost."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from q35c.errors import DiskRefused, OptionError
from q35c.outputs import check_folder, check_output, check_space, write_output
from tests.fake_artifact import write_small


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


STANDING: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (make_fifo, "a FIFO has this name"),
    "socket": (make_socket, "a socket has this name"),
    "directory": (Path.mkdir, "a directory has this name"),
    "device": (make_link("/dev/null"), "a device has this name"),
    "link to a directory": (make_link("."), "a directory has this name"),
    "dangling link": (make_link("absent"), "leads nowhere"),
    "link to itself": (make_link("x.q35c"), "Too many levels"),
}


@pytest.mark.parametrize("kind", STANDING)
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.q35c"
    make, said = STANDING[kind]
    make(path)
    before = os.lstat(path)
    for write in (check_output, write_small, lambda path: write_output(path, b"new")):
        with pytest.raises(OptionError, match=said):
            write(path)
    assert os.path.samestat(before, os.lstat(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent/x", "no such directory"),
        ("file/x", "no such directory"),
        ("x" * 256, "too long"),
        ("/".join(["x" * 200] * 30) + "/x", "too long"),
        ("a\0b", "null"),
        ("a\0b/x", "no such directory"),
        (".", "a directory"),
        ("..", "a directory"),
        ("/dev/null", "a device"),
        (".q35c-0.partial", "removed"),
    ],
    ids=ascii,
)
def test_names_that_cannot_work(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=said):
        check_output(tmp_path / name)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_directory_is_tried_and_not_only_asked() -> None:
    with pytest.raises(OptionError, match="cannot write here"):
        check_output(Path("/proc/x.q35c"))


def test_what_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link", "absent"):
        write_output(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["absent", "file", "link"]


def test_an_input_is_not_replaced(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "old.q35c"):
        (model / name).write_text(name)
    os.link(model / "model.safetensors", tmp_path / "linked")
    for path in (model / "config.json", model / "model.safetensors", tmp_path / "linked"):
        check_output(path)
        with pytest.raises(OptionError, match="would be replaced"):
            check_output(path, [model])
    with pytest.raises(OptionError, match="would be replaced"):
        check_output(model / "old.q35c", [model / "old.q35c"])
    for path in (model / "old.q35c", model / "new.json", tmp_path / "new"):
        check_output(path, [model, tmp_path / "absent"])


def test_another_users_file_in_a_sticky_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").touch()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    check_output(tmp_path / "x")
    tmp_path.chmod(0o1777)
    with pytest.raises(OptionError, match="another user's file"):
        check_output(tmp_path / "x")
    check_output(tmp_path / "y")


def test_a_folder_for_outputs(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b", "*.txt")
    check_folder(tmp_path / "a" / "b", "*.txt")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    for name in ("file", "file/a", "a\0b", "x" * 256):
        with pytest.raises(OptionError, match="cannot make the directory"):
            check_folder(tmp_path / name, "*.txt")


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path, 1)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=7, f_frsize=512))
    check_space(tmp_path, 7 * 512)
    with pytest.raises(DiskRefused, match="3585 bytes free"):
        check_space(tmp_path, 7 * 512 + 1)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    check_space(tmp_path, 1000)
    with pytest.raises(DiskRefused, match="a limit of 1000 bytes"):
        check_space(tmp_path, 1001)


def write_text(path: Path) -> None:
    write_output(path, b"new")


@pytest.mark.parametrize("write", [write_small, write_text])
def test_the_name_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """The file is synced before it gets its name, and its directory after."""
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def record_sync(file: int) -> None:
        status = os.fstat(file)
        is_ours = os.path.samestat(status, os.stat(tmp_path))
        kind = "file" if stat.S_ISREG(status.st_mode) else "directory" if is_ours else "other"
        calls.append(f"sync {kind}")
        sync(file)

    def record_replace(source: str, target: str) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    write(tmp_path / "x")
    assert calls == ["sync file", "rename", "sync directory"]


@pytest.mark.parametrize("write", [write_small, write_text])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_sync_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], kind: str
) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail_with(number: int) -> None:
        def sync(file: int) -> None:
            if stat.S_ISDIR(os.fstat(file).st_mode) == (kind == "directory"):
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", sync)

    fail_with(errno.EIO)
    with pytest.raises(DiskRefused, match="Input/output error"):
        write(path)
    assert (path.read_bytes() == b"old") == (kind == "file")
    assert list(tmp_path.iterdir()) == [path]
    if kind == "directory":
        fail_with(errno.EINVAL)  # a file system that cannot do it
        write(path)
