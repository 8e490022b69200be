"""The compiled vision tower beside eager PyTorch in fp32, whatever the grid, precision and instruction set."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

import q35c
from q35c.artifact import read_artifact
from q35c.errors import OptionError, PromptError
from q35c.verify import verify_artifact
from q35c.verify_pictures import PictureComparison, check_picture
from tests.pictures import (
    GRIDS,
    eager_rows,
    random_patches,
    seeing_artifact,
    tower_config,
)

NARROW = "cpu:x86-64-v3"
CASES = [
    pytest.param("plain", "f32", "cpu", id="f32"),
    pytest.param("odd", "bf16", "cpu", id="bf16"),
    pytest.param("odd", "f32", NARROW, id="f32-v3", marks=pytest.mark.nightly),
    pytest.param("plain", "bf16", NARROW, id="bf16-v3", marks=pytest.mark.nightly),
    pytest.param("odd", "w8", "cpu", id="w8", marks=pytest.mark.nightly),
]


@functools.cache
def model(kind: str, precision: str, target: str = "cpu", threads: int = 2) -> q35c.Model:
    return q35c.load(seeing_artifact(kind, precision, target), threads=threads)


def check_rows(kind: str, precision: str, target: str, grids: Sequence[tuple[int, int]]) -> None:
    """Compare rows: in f32 by their largest difference, else by the cosine of every row."""
    config = tower_config(kind)
    for seed, grid in enumerate(grids):
        patches = random_patches(config, grid, seed)
        rows, want = (
            model(kind, precision, target).see(patches, grid),
            eager_rows(config, grid, patches),
        )
        assert rows.shape == want.shape
        if precision == "f32":
            assert np.abs(rows - want).max() <= 1e-5 * np.abs(want).max(), grid
            continue
        cosines = (rows * want).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(want, axis=1)
        assert cosines.min() >= {"bf16": 0.9999, "w8": 0.999}[precision], grid


@pytest.mark.parametrize(("kind", "precision", "target"), CASES)
def test_rows_equal_eager(kind: str, precision: str, target: str) -> None:
    check_rows(kind, precision, target, (*GRIDS, (2, 128), (16, 16), (14, 18)))


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["f32", "bf16", "w8"])
@pytest.mark.parametrize("width", [768, 1024, 1152])
def test_real_shapes_equal_eager(width: int, precision: str) -> None:
    check_rows(f"real-{width}", precision, "cpu", ((2, 2), (6, 10), (4, 60), (14, 18)))


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_neither_threads_nor_what_was_seen_before_change_a_bit(precision: str) -> None:
    kind = "plain" if precision == "f32" else "odd"
    patches = random_patches(tower_config(kind), (10, 6))
    first = model(kind, precision).see(patches, (10, 6))
    model(kind, precision).see(random_patches(tower_config(kind), (16, 16), 1), (16, 16))
    again = model(kind, precision).see(patches, (10, 6))
    alone = model(kind, precision, threads=1).see(patches, (10, 6))
    assert first.tobytes() == again.tobytes() == alone.tobytes()


def test_text_is_the_same_with_a_tower_and_without() -> None:
    blind = q35c.load(seeing_artifact("plain", "f32", is_seeing=False))
    logits = [m.session(64).prefill([5, 6, 7, 8]) for m in (blind, model("plain", "f32"))]
    np.testing.assert_array_equal(*logits)
    with pytest.raises(PromptError, match="sees no pictures"):
        blind.see(random_patches(tower_config(), (2, 2)), (2, 2))
    blind.close()


def test_text_alone_touches_neither_weights_nor_buffers_of_the_tower() -> None:
    """Their pages stay where they were: neither in memory, nor asked for."""
    path = seeing_artifact("odd", "bf16")
    with q35c.load(path, verify=False) as loaded, read_artifact(path) as artifact:
        loaded.generate([5, 6, 7], max_new_tokens=4)
        device, manifest = loaded._executor.device, artifact.manifest
        before = [region._array[size:].any() for region, size in behind(device, manifest)]
        assert before == [False, False]
        loaded.see(random_patches(tower_config("odd"), (4, 4)), (4, 4))
        assert manifest.tower_bytes > 0 and manifest.text_weights_bytes < manifest.weights_bytes


def behind(device, manifest):
    """Return the device's blocks, and where in them what only pictures need begins, in whole pages."""
    return [
        (block, -(-size // 4096) * 4096)
        for block, size in ((device._arena, manifest.arena_bytes), (device._io, manifest.io.bytes))
    ]


def test_manifest_says_what_a_picture_takes() -> None:
    with read_artifact(seeing_artifact("plain", "f32")) as artifact:
        manifest = artifact.manifest
    vision = manifest.vision
    assert vision is not None and vision.config == tower_config()
    assert vision.parameters.patch_size == 4
    tower = vision.tower
    assert tower.tokens == 64
    assert tower.io.fields["patches"].shape == (256, 96)
    assert tower.io.fields["embeddings"].shape == (64, 48)
    assert {manifest.kernels[number].family for number in tower.steps} == {
        "scale_pixels", "interpolate_rows", "linear_bias", "layer_norm", "axial_rotary_table", "picture_prepare",
        "picture_attention",
    }  # fmt: skip
    assert all(weight.sources[0].startswith("visual.") for weight in manifest.weights[tower.first_weight :])  # fmt: skip


BAD = {
    "odd grid": ((3, 4), (2, 2), "2 x 2 patches"),
    "empty grid": ((0, 4), (2, 2), "grid"),
    "three sides": ((2, 2, 2), (2, 2), "not a grid"),
    "too many tokens": ((18, 16), (18, 16), "too large"),
    "other patches": ((2, 4), (2, 2), "not the patches"),
    "not numbers": (("a", 2), (2, 2), "grid"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused_by_name(name: str) -> None:
    grid, made, words = BAD[name]
    with pytest.raises((PromptError, OptionError), match=words):
        model("plain", "f32").see(random_patches(tower_config(), made), grid)


def test_patches_are_bytes() -> None:
    patches = random_patches(tower_config(), (2, 2)).astype(np.float32)
    with pytest.raises(PromptError, match="not the patches"):
        model("plain", "f32").see(patches, (2, 2))


def test_verify_compares_a_picture_and_what_follows_it() -> None:
    path = seeing_artifact("plain", "f32")
    found = verify_artifact(path, path.parent / "seeing-plain").picture
    assert found is not None and found.precision == "f32" and found.grid[0] != found.grid[1]
    assert (
        found.difference < 1e-5 and found.logits_difference < 1e-5 and found.least_cosine > 0.999999
    )


@pytest.mark.parametrize("change", [{"least_cosine": 0.9}, {"difference": 1.0}, {"logits_difference": 1.0}])  # fmt: skip
def test_a_broken_promise_of_pictures_is_said(change: dict[str, float]) -> None:
    kept = PictureComparison((4, 6), "f32", 1e-6, 0.999999, 1e-6)
    kept = replace(kept, precision="bf16") if "least_cosine" in change else kept
    assert check_picture(kept, 1e-3) == ()
    (sentence,) = check_picture(replace(kept, **change), 1e-3)
    assert "promised" in sentence
