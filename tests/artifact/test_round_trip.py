"""What is written is read back, and the file is what the format says it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from q35c.artifact import layout, read_artifact
from q35c.artifact.manifest import FORMAT
from q35c.errors import ArtifactError, ArtifactVersionError
from q35c.runtime.cpu.blocks import WeightBlock
from tests.fake_artifact import rebuild, write_fake, write_small


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_small(tmp_path / "small.q35c")
    return tmp_path / "small.q35c"


def test_manifest_and_segments_come_back(small: Path) -> None:
    written = write_small(small)
    with read_artifact(small) as artifact:
        assert artifact.manifest == written
        assert artifact.code() == b"\x7fELF no"
        assert artifact.segment("tokenizer") == b"{}"
        artifact.verify_segments()
        artifact.verify_weights()


@pytest.mark.parametrize("mapped", [True, False])
def test_weights_come_back_aligned_and_read_only(small: Path, mapped: bool) -> None:
    with read_artifact(small) as artifact:
        weights = WeightBlock(artifact, mapped=mapped)
    assert weights.address % 64 == 0
    assert np.array_equal(
        weights.array("a.weight"), np.arange(64, dtype=np.float32).reshape(1, 2, 32)
    )
    assert weights.array("b").tobytes() == b"\x01\x02\x03\x04\x05\x06"
    with pytest.raises(ValueError):
        weights.array("b")[0] = 1
    with pytest.raises(KeyError):
        weights.array("c")


def test_safetensors_opens_it(small: Path) -> None:
    """The container is the standard one: other tools list it and read every tensor."""
    with safe_open(small, framework="numpy") as file:
        assert set(file.keys()) == {"code", "tokenizer", "a.weight", "b"}
        assert np.array_equal(
            file.get_tensor("a.weight"), np.arange(64, dtype=np.float32).reshape(1, 2, 32)
        )
        # 6 bytes of bf16 are listed with their padding, as the format allows no holes.
        assert file.get_tensor("b").tobytes() == b"\x01\x02\x03\x04\x05\x06" + bytes(58)
        text = file.metadata()["q35c"]
        assert hashlib.sha256(text.encode()).hexdigest() == file.metadata()["q35c.sha256"]
        assert json.loads(text)["format"] == FORMAT


def test_everything_is_aligned_in_the_file(small: Path) -> None:
    data = small.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 64 == 0
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    ends = [0]
    for tensor in header.values():
        start, end = tensor["data_offsets"]
        assert start % 64 == 0 and start == ends[-1]
        ends.append(end)
    assert 8 + length + ends[-1] == len(data)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    write_small(tmp_path / "a")
    write_small(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_segment_order_in_the_file() -> None:
    names = ["weights", "zebra", "tokenizer", "chat_template", "code"]
    assert layout.segment_order(names) == ["code", "tokenizer", "chat_template", "zebra"]


def test_unknown_segment(small: Path) -> None:
    with read_artifact(small) as artifact:
        assert not artifact.has_segment("nothing")
        for name in ("nothing", "weights"):
            with pytest.raises(ArtifactError, match="no segment"):
                artifact.segment(name)


def test_closed_artifact_keeps_its_mapping(small: Path) -> None:
    artifact = read_artifact(small)
    weights = WeightBlock(artifact, mapped=True)
    artifact.close()
    artifact.close()
    assert weights.array("a.weight")[0, 1, 31] == 63


def test_derived_memory_figures(tmp_path: Path) -> None:
    manifest = write_fake(tmp_path / "m", with_code=False)
    memory = manifest.memory
    assert memory.state_per_sequence == 384 + 4096 + 2 * 4 * 256 * 32
    assert memory.peak == memory.weights + 4 * memory.state_per_sequence + memory.arena + memory.io


@pytest.mark.parametrize("version", [3, FORMAT + 1])
def test_another_format_version_is_named(small: Path, version: int) -> None:
    def to_version(manifest: dict) -> str:
        # An old or future manifest may look different altogether: the version is looked at first.
        return json.dumps({"format": version, "else": [1]})

    small.write_bytes(rebuild(small.read_bytes(), to_version))
    with pytest.raises(ArtifactVersionError) as caught:
        read_artifact(small)
    assert (caught.value.expected, caught.value.got) == (FORMAT, version)
    for part in (str(small), str(FORMAT), str(version), "compile the model again"):
        assert part in str(caught.value)


def test_message_names_file_and_field(small: Path) -> None:
    def change(manifest: dict) -> str:
        manifest["entries"][1]["tokens"] = "many"
        return json.dumps(manifest, sort_keys=True, separators=(",", ":"))

    small.write_bytes(rebuild(small.read_bytes(), change))
    with pytest.raises(ArtifactError) as caught:
        read_artifact(small)
    assert f"{small}: manifest at $.entries[1].tokens" in str(caught.value)
