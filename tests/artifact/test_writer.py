"""The writer publishes whole files only, whatever goes wrong."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from q35c.artifact import read_artifact
from q35c.artifact.writer import ArtifactWriter, WeightEntry
from q35c.errors import DiskRefused, InternalError, OptionError
from q35c.outputs import PREFIX, SUFFIX
from q35c.temporary import sweep_stale
from tests.fake_artifact import small_fields, write_small

SEGMENTS = {"code": b"code"}
A, B = np.arange(64, dtype=np.float32), b"\x01\x02\x03\x04\x05\x06"


def open_writer(path: Path, progress: Any = None, **changes: Any) -> ArtifactWriter:
    fields, entries = small_fields()
    return ArtifactWriter(path, {**fields, **changes}, SEGMENTS, entries, progress)


def test_nothing_appears_without_commit(tmp_path: Path) -> None:
    path = tmp_path / "model.q35c"
    with open_writer(path) as writer:
        writer.write("a.weight", A)
        assert [p.name for p in tmp_path.iterdir()] != ["model.q35c"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "model.q35c"
    path.write_text("old")
    with pytest.raises(error), open_writer(path) as writer:
        writer.write("a.weight", A)
        raise error
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_commit_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.q35c"
    path.write_text("old")
    write_small(path)
    with read_artifact(path) as artifact:
        artifact.verify_weights()
    assert len(list(tmp_path.iterdir())) == 1


def test_chunks_of_any_size(tmp_path: Path) -> None:
    done: list[int] = []
    with open_writer(tmp_path / "a", lambda now, total: done.append(now)) as writer:
        raw = A.tobytes()
        for start in range(0, len(raw), 7):
            writer.write("a.weight", raw[start : start + 7])
        writer.write("b", b"")
        writer.write("b", bytearray(B))
        writer.commit()
    write_small(tmp_path / "b")
    with read_artifact(tmp_path / "a") as first, read_artifact(tmp_path / "b") as second:
        assert first.manifest.segments["weights"] == second.manifest.segments["weights"]
    assert done == sorted(done) and done[-1] == 320


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([("b", B)], "in order"),
        ([("a.weight", A), ("a.weight", A)], "in order"),
        ([("a.weight", A), ("b", B), ("c", b"x")], "in order"),
        ([("a.weight", np.zeros(65, np.float32))], "too long"),
        ([("a.weight", A), ("b", B[:5])], "not all weights"),
    ],
)
def test_misuse_is_an_internal_error(tmp_path: Path, calls: list[Any], message: str) -> None:
    with pytest.raises(InternalError, match=message), open_writer(tmp_path / "m") as writer:
        for name, data in calls:
            writer.write(name, data)
        writer.commit()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"context": 100},
        {"batch": 0},
        {"arena_bytes": 100},
        {"memory": {"weights": 1}},
        {"unknown": 1},
        {"model": {}},
        {"max_threads": np.int64(4)},
    ],
)
def test_a_wrong_manifest_is_an_internal_error(tmp_path: Path, changes: Any) -> None:
    with pytest.raises(InternalError, match="not valid"):
        open_writer(tmp_path / "m", **changes)
    assert list(tmp_path.iterdir()) == []


def test_two_weights_of_one_name(tmp_path: Path) -> None:
    fields, _ = small_fields()
    twice = [WeightEntry("a", "vector", "f32", (16,))] * 2
    with pytest.raises(InternalError, match="used twice"):
        ArtifactWriter(tmp_path / "m", fields, SEGMENTS, twice)


def test_too_little_disk_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The smallest artifact needs a little more.
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=7, f_frsize=512))
    with pytest.raises(DiskRefused, match="3584 bytes free"):
        open_writer(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing_call", range(5))
def test_a_disk_that_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    real, calls = os.write, iter(range(1000))

    def write(file: int, data: Any) -> int:
        if next(calls) == failing_call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data[:300])  # short writes must be continued

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(DiskRefused, match="No space"), open_writer(tmp_path / "m") as writer:
        writer.write("a.weight", A)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_wrong_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(InternalError, match="does not verify"),
        open_writer(tmp_path / "m") as writer,
    ):
        writer.write("a.weight", A)
        writer.write("b", B)
        real = os.fsync

        def corrupt(file: int) -> None:
            real(file)
            os.pwrite(file, b"!", writer.file_bytes - 100)

        monkeypatch.setattr(os, "fsync", corrupt)
        writer.commit()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["no/such/dir/m", "directory"])
def test_target_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(OptionError):
        open_writer(tmp_path / name)


def test_sweeping_removes_only_what_is_stale(tmp_path: Path) -> None:
    with open_writer(tmp_path / "m") as writer:
        living = {path.name for path in tmp_path.iterdir()}
        (tmp_path / ".q35c-0123.partial").write_text("left by a dead writer")
        (tmp_path / "mine.partial").write_text("another's")
        (tmp_path / "target").write_text("x")
        (tmp_path / ".q35c-4567.partial").symlink_to(tmp_path / "target")
        removed = sweep_stale(tmp_path, PREFIX, SUFFIX)
        assert [path.name for path in removed] == [".q35c-0123.partial"]
        left = {path.name for path in tmp_path.iterdir()}
        assert left == living | {"mine.partial", "target", ".q35c-4567.partial"}
        writer.write("a.weight", A)
        writer.write("b", B)
        writer.commit()


def test_a_temporary_is_locked_while_its_writer_lives(tmp_path: Path) -> None:
    with open_writer(tmp_path / "m"):
        (temporary,) = tmp_path.iterdir()
        with open(temporary, "rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
