"""R3: every truncation and every flipped bit is refused before any code could be loaded."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from q35c.artifact import read_artifact
from q35c.errors import ArtifactError
from tests.fake_artifact import write_small

SEED = int(os.environ.get("Q35C_TEST_SEED", "1"))


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


def test_flipped_bits(tmp_path: Path, whole: bytes) -> None:
    """No bit of the file is free: header, padding, code, tokenizer and weights are all covered."""
    random.seed(SEED)
    bits = random.sample(range(8 * len(whole)), 4000)
    bits += [8 * (len(whole) - 1 - at) for at in range(700)]  # every byte behind the header
    path = tmp_path / "flipped"
    path.write_bytes(whole)
    file = os.open(path, os.O_RDWR)
    for bit in bits:
        at = bit // 8
        os.pwrite(file, bytes([whole[at] ^ (1 << bit % 8)]), at)
        try:
            check_fully(path)
        except ArtifactError:
            pass
        else:
            pytest.fail(f"bit {bit} went unnoticed: Q35C_TEST_SEED={SEED}")
        os.pwrite(file, whole[at : at + 1], at)
    os.close(file)
    check_fully(path)


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
