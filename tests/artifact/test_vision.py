"""The manifest's part about pictures: what it holds, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from q35c.artifact import read_artifact
from q35c.artifact.leaves import Io
from q35c.artifact.schema import decode, encode
from q35c.artifact.tower import Tower, Vision, tower_io
from q35c.errors import ArtifactError, InternalError
from q35c.vision.parameters import ImageLimits, VisionParameters
from q35c.vision_config import VisionConfig
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
from tests.fake_artifact import write_small

TOWER = VisionConfig(
    depth=1,
    hidden_size=32,
    num_heads=2,
    intermediate_size=32,
    out_hidden_size=16,
    patch_size=16,
    temporal_patch_size=2,
    num_position_embeddings=16,
    image_token_id=5,
    video_token_id=6,
    vision_start_token_id=3,
    vision_end_token_id=4,
)
PROGRAM = Tower(
    tokens=4,
    symbol="prefill",
    steps=(0,),
    step_weights=(1,),
    first_weight=1,
    io=decode(Io, tower_io(TOWER, 4), "io"),
    arena_bytes=128,
)
VISION = Vision(TOWER, VisionParameters(image=ImageLimits(1024, 65536), max_tokens=4), PROGRAM)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("vision") / "whole"
    write_small(path, vision=encode(VISION))
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "m").write_bytes(whole)
    with read_artifact(tmp_path / "m") as artifact:
        assert artifact.manifest.vision == VISION


def test_a_model_of_text_alone_has_none(tmp_path: Path) -> None:
    assert write_small(tmp_path / "m").vision is None


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("parameters", "patch_size"), 14, "patch_size"),
        (("parameters", "merge_size"), 1, "merge_size"),
        (("config", "temporal_patch_size"), 1, "temporal_patch_size"),
        (("config", "out_hidden_size"), 32, "out_hidden_size"),
        (("config", "image_token_id"), 1 << 20, "outside the vocabulary"),
        (("config", "depth"), 0, "depth"),
        (("parameters", "image", "max_pixels"), 1, "pixels"),
        (("parameters", "video", "fps"), 0, "fps"),
    ],
)
def test_contradictions_are_refused_by_name(
    tmp_path: Path, whole: bytes, place: tuple[str, ...], value: Any, words: str
) -> None:
    text = mutate(manifest_of(whole), ("vision", *place), value)
    (tmp_path / "m").write_bytes(forge(whole, text))
    with pytest.raises(ArtifactError, match=words):
        read_artifact(tmp_path / "m")


def test_every_field_with_every_value(tmp_path: Path, whole: bytes) -> None:
    """What is accepted stands in the plan, which the code is bound to: no other value passes."""
    sample = manifest_of(whole)
    chosen = [place for place in places(sample) if place[0] == "vision"]
    for place in chosen:
        for value in [*VALUES, NAN, MISSING]:
            text = mutate(sample, place, value)
            manifest = load_fully(tmp_path / "mutant", forge(whole, text))
            assert manifest is None or json.loads(manifest.to_json()) == sample, (place, value)
    assert len(chosen) == 1 + 2 + 12 + 6 + 2 + 6 + (1 + 4 + 4 + 3 + 5 * 6)


def test_a_compiler_that_contradicts_itself_is_found(tmp_path: Path) -> None:
    wrong = encode(VISION)
    wrong["parameters"]["patch_size"] = 14
    with pytest.raises(InternalError, match="patch_size"):
        write_small(tmp_path / "m", vision=wrong)
