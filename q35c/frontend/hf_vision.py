"""Read the vision tower of a Hugging Face `config.json`, as hf_config.py does the text tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from q35c.errors import ConfigError, UnsupportedConfig
from q35c.frontend.hf_keys import FIXED, is_absent, is_irrelevant
from q35c.vision_config import CHANNELS, MERGE, VisionConfig

# Defaults of Hugging Face's vision config; its tokens stand beside it.
_SIZES: dict[str, int] = {
    "depth": 27,
    "hidden_size": 1152,
    "num_heads": 16,
    "intermediate_size": 4304,
    "out_hidden_size": 3584,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
}
_TOKENS: dict[str, int] = {
    "image_token_id": 248056,
    "video_token_id": 248057,
    "vision_start_token_id": 248053,
    "vision_end_token_id": 248054,
}
# Keys of which one meaning is computed; the names of the whole model's type are older.
_FIXED: dict[str, tuple[Any, ...]] = {
    **FIXED,
    "in_channels": (CHANNELS,),
    "spatial_merge_size": (MERGE,),
    "hidden_act": ("gelu_pytorch_tanh",),
    "deepstack_visual_indexes": ([],),
    "model_type": ("qwen3_5", "qwen3_5_vision", "qwen3_5_moe", "qwen3_5_moe_vision"),
}
_ROPE: dict[str, tuple[Any, ...]] = {
    "rope_type": ("axial", "default"),
    "rope_theta": (10000, 10000.0),
}


def read_vision_config(
    document: Mapping[str, Any], where: str = "config.json"
) -> VisionConfig | None:
    """Return the vision tower of a `config.json`, None if it has none. Raises ConfigError or UnsupportedConfig."""
    given = document.get("vision_config")
    if given is None:
        return None
    where = f"{where} at vision_config"
    if not isinstance(given, dict):
        raise ConfigError("must be a JSON object", where=where)
    items = {key: value for key, value in cast(dict[str, Any], given).items() if value is not None}
    rope = items.pop("rope_parameters", {})
    if not isinstance(rope, dict):
        raise ConfigError("rope_parameters must be a JSON object", where=where)
    _check(cast(dict[str, Any], rope), {}, _ROPE, where)
    _check(items, _SIZES, _FIXED, where)
    sizes = {key: items.get(key, default) for key, default in _SIZES.items()}
    tokens = {key: document.get(key, default) for key, default in _TOKENS.items()}
    return VisionConfig.from_dict({**sizes, **tokens}, where)


def _check(
    items: Mapping[str, Any],
    known: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, ...]],
    where: str,
) -> None:
    for key, value in items.items():
        if key in fixed:
            if not any(type(value) is type(good) and value == good for good in fixed[key]):
                expected = " or ".join(map(repr, fixed[key]))
                raise UnsupportedConfig(
                    f"vision {key} is not supported", where=where, expected=expected, got=value
                )
        elif not (key in known or is_irrelevant(key) or is_absent(value)):
            raise UnsupportedConfig(f"unknown key {key!r:.80}", where=where)
