"""The target of a CUDA artifact: images, kernels and launch tables that must agree with everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from q35c.artifact import read_artifact
from q35c.artifact.target import CudaArgument, CudaExtent, CudaTarget
from q35c.errors import ArtifactError
from tests.abuse.test_manifest_mutants import (
    MISSING,
    NAN,
    VALUES,
    forge,
    load_fully,
    manifest_of,
    mutate,
    places,
)
from tests.fake_artifact import write_cuda

ARCHITECTURES = ("sm_80", "emulated")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("cuda") / "whole"
    write_cuda(path, *ARCHITECTURES)
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path, whole: bytes) -> None:
    manifest = load_fully(tmp_path / "m", whole)
    assert manifest is not None and isinstance(manifest.target, CudaTarget)
    assert [image.segment for image in manifest.target.images] == ["image_sm_80", "image_emulated"]
    with read_artifact(tmp_path / "m") as artifact:
        assert artifact.segment("image_sm_80") == b"image"
    assert artifact.manifest.target.kernels[0].grid[0].blocks(9) == 4


def test_extents_and_arguments() -> None:
    assert [CudaExtent(3, 2, 8).blocks(rows) for rows in (1, 4, 5)] == [3, 3, 6]
    assert CudaExtent(7, 0, 1).blocks(100) == 7
    assert CudaArgument("i32", 1, 1).value(9) == 9
    assert CudaArgument("arena", 64, 256).value(3) == 576
    assert CudaArgument("arena", 64, 256).type == "pointer"


# What contradicts nothing else in the manifest: only the code's trailer tells.
PLAUSIBLE: dict[str, Any] = {
    "another kernel": ("kernels", 0, "symbol", "k1_kernel"),
    "a larger grid": ("kernels", 0, "grid", 0, "count", 3),
    "a smaller block": ("kernels", 0, "block", [32, 1, 1]),
    "less shared memory": ("kernels", 0, "shared_bytes", 64),
    "another place in a blob": ("programs", 0, "launches", 0, "arguments", 0, "start", 128),
    "another number": ("programs", 0, "launches", 0, "arguments", 3, "start", 5),
    "other figures": ("images", 0, "figures", 0, "registers", 33),
}
CONTRADICTIONS: dict[str, Any] = {
    "another image": ("images", 0, "sha256", "0" * 64),
    "an image whose segment is missing": ("images", 0, "architecture", "sm_90"),
    "two images of one architecture": ("images", 1, "architecture", "sm_80"),
    "no image": ("images", []),
    "no architecture": ("images", 0, "architecture", "../sm_80"),
    "figures of an emulated image": ("images", 1, "figures", [{}]),
    "no figures": ("images", 0, "figures", []),
    "no program": ("programs", []),
    "no kernel": ("kernels", []),
    "a block of too many threads": ("kernels", 0, "block", [32, 33, 1]),
    "a block of two axes": ("kernels", 0, "block", [32, 4]),
    "more shared memory than there is": ("kernels", 0, "shared_bytes", 232_448),
    "a pointer before its blob": ("programs", 1, "launches", 0, "arguments", 0, "start", -1),
    "a pointer behind its blob": ("programs", 1, "launches", 0, "arguments", 0, "start", 320),
    "a last row behind its blob": ("programs", 0, "launches", 0, "arguments", 1, "per_row", 4096),
    "a pointer for a number": ("programs", 0, "launches", 0, "arguments", 2, "of", "arena"),
    "a number too large": ("programs", 0, "launches", 0, "arguments", 2, "start", 2**31),
    "too few arguments": ("programs", 0, "launches", 0, "arguments", []),
    "too many launches": ("programs", 0, "launches", []),
    "another name": ("name", "cpu:x86-64-v3"),
    "another backend": ("backend", "cpu"),
}


@pytest.mark.parametrize("name", [*PLAUSIBLE, *CONTRADICTIONS])
def test_targets_that_are_refused(tmp_path: Path, whole: bytes, name: str) -> None:
    *place, value = (PLAUSIBLE | CONTRADICTIONS)[name]
    text = mutate(manifest_of(whole), ("target", *place), value)
    (tmp_path / "mutant").write_bytes(forge(whole, text))
    what = "another manifest" if name in PLAUSIBLE else "target"
    with pytest.raises(ArtifactError, match=what), read_artifact(tmp_path / "mutant") as artifact:
        artifact.verify_segments()


def test_every_field_with_every_value(tmp_path: Path, whole: bytes) -> None:
    sample = manifest_of(whole)
    chosen = [place for place in places(sample) if place[0] == "target"]
    for place in chosen:
        for value in [*VALUES, NAN, *([MISSING] if isinstance(place[-1], str) else [])]:
            text = mutate(sample, place, value)
            manifest = load_fully(tmp_path / "mutant", forge(whole, text))
            assert manifest is None or json.loads(manifest.to_json()) == sample, (place, value)
    assert len(chosen) > 80
