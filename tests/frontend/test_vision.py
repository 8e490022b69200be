"""What a multimodal checkpoint says of vision, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config, Qwen3_5VisionConfig

from q35c.errors import ConfigError, UnsupportedConfig
from q35c.frontend.checkpoint import open_checkpoint
from q35c.frontend.hf_vision import read_vision_config
from q35c.frontend.vision import read_vision
from q35c.vision.files import IMAGE, PROCESSOR
from q35c.vision.parameters import ImageLimits, VisionParameters
from q35c.vision_config import VisionConfig
from tests.models import edit_json, write_checkpoint
from tests.vision.test_files import PICTURES

PUBLISHED = {
    "deepstack_visual_indexes": [],
    "depth": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 768,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "model_type": "qwen3_5",
    "num_heads": 12,
    "num_position_embeddings": 2304,
    "out_hidden_size": 1024,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def test_a_published_tower_is_read() -> None:
    found = read_vision_config({"vision_config": PUBLISHED, "image_token_id": 7})
    assert found == VisionConfig(12, 768, 12, 3072, 1024, 16, 2, 2304, 7, 248057, 248053, 248054)


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    document = Qwen3_5Config(vision_config=Qwen3_5VisionConfig()).to_dict()
    assert read_vision_config(document) == read_vision_config({"vision_config": {}})


def test_a_model_of_text_has_no_tower() -> None:
    assert read_vision_config({"model_type": "qwen3_5_text"}) is None
    assert read_vision_config({"vision_config": None}) is None


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("hidden_act", "gelu", UnsupportedConfig),
        ("in_channels", 4, UnsupportedConfig),
        ("spatial_merge_size", 4, UnsupportedConfig),
        ("deepstack_visual_indexes", [8], UnsupportedConfig),
        ("model_type", "siglip", UnsupportedConfig),
        ("use_windows", True, UnsupportedConfig),
        ("rope_type", 7, UnsupportedConfig),
        ("depth", 0, ConfigError),
        ("patch_size", [16, 16], ConfigError),
        ("num_position_embeddings", 2305, UnsupportedConfig),
    ],
)
def test_what_is_not_computed_is_refused_by_name(key: str, value: Any, error: type) -> None:
    changed = {"rope_parameters": {key: value}} if key == "rope_type" else {key: value}
    with pytest.raises(error, match=key):
        read_vision_config({"vision_config": PUBLISHED | changed})


def test_a_rotary_table_of_another_base_is_refused() -> None:
    with pytest.raises(UnsupportedConfig, match="rope_theta"):
        read_vision_config({"vision_config": PUBLISHED | {"rope_parameters": {"rope_theta": 1e6}}})


@pytest.mark.parametrize("value", [7, [], "tower"])
def test_a_tower_is_an_object(value: Any) -> None:
    with pytest.raises(ConfigError, match="object"):
        read_vision_config({"vision_config": value})


def checkpoint(tmp_path: Path, **vision: Any) -> Path:
    path = write_checkpoint(tmp_path / "model", layout="multimodal")
    edit_json(path / "config.json", vision_config=PUBLISHED | vision)
    return path


def test_a_checkpoint_says_both(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    small = {**PICTURES, "size": {"shortest_edge": 1024, "longest_edge": 65536}}
    for name, document in ((IMAGE, small), (PROCESSOR, {"image_processor": small})):
        (path / name).write_text(json.dumps(document))
        found = read_vision(open_checkpoint(path))
        assert found is not None and found.config.depth == 12
        assert found.parameters == VisionParameters(image=ImageLimits(1024, 65536))
        (path / name).unlink()


def test_a_tower_without_settings_of_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="how pictures are prepared"):
        read_vision(open_checkpoint(checkpoint(tmp_path)))


def test_patches_are_prepared_as_they_are_read(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, patch_size=14)
    (path / IMAGE).write_text(json.dumps(PICTURES))
    with pytest.raises(ConfigError, match="as the tower reads them"):
        read_vision(open_checkpoint(path))


def test_a_text_checkpoint_says_nothing(tmp_path: Path) -> None:
    assert read_vision(open_checkpoint(write_checkpoint(tmp_path / "model"))) is None
