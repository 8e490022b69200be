"""R3: every truncation and every flipped bit is refused before any code could be loaded."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import q35c
from q35c.artifact import layout, read_artifact
from q35c.errors import ArtifactError
from tests.fake_artifact import write_fake, write_small

SEED = int(os.environ.get("Q35C_TEST_SEED", "1"))
FLIPS = int(os.environ.get("Q35C_TEST_FLIPS", "1000"))


def check_fully(path: Path) -> None:
    with read_artifact(path) as artifact:
        artifact.verify_segments()
        artifact.verify_weights()


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    write_small(tmp_path / "whole")
    check_fully(tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


def test_truncation_at_every_length(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "short"
    path.write_bytes(whole)
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        with pytest.raises(ArtifactError):
            read_artifact(path)


@pytest.mark.parametrize("extra", [1, 63, 64, 4096])
def test_trailing_bytes(tmp_path: Path, whole: bytes, extra: int) -> None:
    path = tmp_path / "long"
    path.write_bytes(whole + bytes(extra))
    with pytest.raises(ArtifactError, match="too long"):
        read_artifact(path)


def test_every_flipped_bit(tmp_path: Path, whole: bytes) -> None:
    """No bit of the file is free: header, padding, code, tokenizer and weights are all covered."""
    header = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "flipped"
    path.write_bytes(whole)
    flipped = 0
    # What lies behind the header cannot change what is read of it: one open file serves all those.
    with Flips(path, whole) as flips, read_artifact(path) as artifact:
        for bit in range(8 * len(whole)):
            with flips.flipped(bit), pytest.raises(ArtifactError):
                if bit < 8 * header:
                    read_artifact(path)
                else:
                    artifact.verify_segments()
                    artifact.verify_weights()
                pytest.fail(f"bit {bit} went unnoticed")
            flipped += 1
    assert flipped > 20_000
    check_fully(path)


def test_damage_is_refused_before_code_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flips and cuts of an artifact with real code, through the door that a user takes.

    Q35C_TEST_FLIPS sets how many bits are flipped, Q35C_TEST_SEED which.
    """
    path = tmp_path / "real"
    write_fake(path)
    data = path.read_bytes()
    with q35c.load(path, threads=1):
        pass

    def forbidden(_code: bytes) -> None:
        raise AssertionError("code was loaded")

    monkeypatch.setattr("q35c.runtime.cpu.device.Library", forbidden)
    header = 8 + int.from_bytes(data[:8], "little")
    chosen = random.Random(SEED)
    bits = chosen.sample(range(8 * len(data)), FLIPS // 2)
    bits += [chosen.randrange(8 * header) for _ in range(FLIPS - FLIPS // 2)]
    with Flips(path, data) as flips:
        for bit in bits:
            with flips.flipped(bit), pytest.raises(ArtifactError):
                q35c.load(path, threads=1)
                pytest.fail(f"bit {bit} went unnoticed: Q35C_TEST_SEED={SEED}")
    for length in sorted(edges(path), reverse=True):
        os.truncate(path, length)
        with pytest.raises(ArtifactError):
            q35c.load(path, threads=1)


def edges(path: Path) -> set[int]:
    """Return the lengths that cut a file just before, at and just behind each edge of it."""
    with read_artifact(path) as artifact:
        manifest, size = artifact.manifest, artifact.file_bytes
    offsets, end = layout.segment_offsets(manifest.segments)
    start = size - end
    places = {0, 8, start, size}
    for name, offset in offsets.items():
        places |= {start + offset, start + offset + manifest.segments[name].bytes}
    for weight in manifest.weights:
        at = start + offsets["weights"] + weight.offset
        places |= {at, at + weight.bytes}
    return {place + by for place in places for by in (-1, 0, 1) if 0 <= place + by < size}


class Flips:
    """Flip single bits of a file in place, and put each right again."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._data, self._file = data, os.open(path, os.O_RDWR)

    def __enter__(self) -> Flips:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    @contextlib.contextmanager
    def flipped(self, bit: int) -> Iterator[None]:
        at = bit // 8
        os.pwrite(self._file, bytes([self._data[at] ^ (1 << bit % 8)]), at)
        try:
            yield
        finally:
            os.pwrite(self._file, self._data[at : at + 1], at)


def test_damage_is_named(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "damaged"
    for marker, message in ((b"\x7fELF no", "'code' is damaged"), (b"{}\0\0\0", "'tokenizer'")):
        data = bytearray(whole)
        data[data.rindex(marker)] ^= 1
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=message):
            check_fully(path)


def test_file_that_shrinks_while_open(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "shrinking"
    path.write_bytes(whole)
    with read_artifact(path) as artifact:
        os.truncate(path, len(whole) - 100)
        with pytest.raises(ArtifactError, match="shorter"):
            artifact.verify_weights()


def test_things_that_are_no_artifact(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it for reading would block
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello, world, this is no artifact")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "locked").write_bytes(b"x")
    (tmp_path / "locked").chmod(0)
    names = [
        "fifo",
        "directory",
        "empty",
        "text",
        "loop",
        "locked",
        "missing",
        "nul\0byte",
        "x" * 300,
    ]
    for name in [*(tmp_path / name for name in names), Path("/dev/zero"), Path("/dev/null")]:
        with pytest.raises(ArtifactError):
            read_artifact(name)
