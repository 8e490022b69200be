"""`q35c inspect` and `q35c verify-file` look at a file and run nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from q35c.artifact import read_artifact
from q35c.artifact.schema import encode
from tests.cli.conftest import Run
from tests.fake_artifact import write_cuda, write_fake


@pytest.fixture
def codeless(tmp_path: Path) -> Path:
    """Return an artifact whose code segment could not be loaded."""
    path = tmp_path / "codeless.q35c"
    write_fake(path, with_code=False)
    return path


def test_overview(run: Run, codeless: Path) -> None:
    result = run("inspect", codeless, "--kernels", "--weights")
    assert result.exit_code == 0
    for text in (
        "qwen3_5, hidden 16, vocabulary 270",
        "2: 1 full attention, 1 linear attention",
        "256 tokens a sequence, up to 256 on request, 4 sequences, 8 threads",
        "dtype=f32 n=4 taps=(1, 2)",
        "f32[270, 270]",
        "embed_tokens.weight",
    ):
        assert text in result.stdout


def test_json_is_the_manifest(run: Run, codeless: Path) -> None:
    document = json.loads(run("inspect", codeless, "--json").stdout)
    with read_artifact(codeless) as artifact:
        assert document.pop("file_bytes") == codeless.stat().st_size
        assert document.pop("manifest_sha256") == artifact.digest
        assert document == encode(artifact.manifest)


def test_verify_file_accepts(run: Run, codeless: Path) -> None:
    result = run("verify-file", codeless)
    assert (result.exit_code, "intact" in result.stdout) == (0, True)


@pytest.mark.parametrize("segment", ["code", "tokenizer", "weights"])
def test_verify_file_finds_one_flipped_bit(run: Run, codeless: Path, segment: str) -> None:
    flip(codeless, segment)
    result = run("verify-file", codeless)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"segment {segment!r} is damaged" in result.stderr


def test_inspect_checks_all_but_the_weights(run: Run, codeless: Path) -> None:
    flip(codeless, "weights")
    assert run("inspect", codeless).exit_code == 0
    flip(codeless, "tokenizer")
    assert run("inspect", codeless).exit_code == 1


def flip(path: Path, segment: str) -> None:
    """Invert a bit in the last bytes of a segment."""
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = "noise" if segment == "weights" else segment
    start = header[name]["data_offsets"][0]
    data[8 + int.from_bytes(data[:8], "little") + start] ^= 1
    path.write_bytes(data)


def test_images_of_a_cuda_target_and_their_figures(run: Run, tmp_path: Path) -> None:
    write_cuda(tmp_path / "m", "sm_80", "emulated")
    shown = run("inspect", tmp_path / "m", "--kernels")
    assert shown.exit_code == 0
    assert "cuda (images for sm_80: up to 32 registers, no kernels spill; emulated)" in shown.output
    assert "128" in shown.output and "5120" in shown.output  # threads; dynamic and static bytes
