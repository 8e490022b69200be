"""What a multimodal checkpoint says of its vision tower, and of how pictures and clips become what the tower reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from q35c.errors import ConfigError, UnsupportedConfig
from q35c.frontend.checkpoint import Checkpoint
from q35c.frontend.hf_keys import FIXED, is_absent, is_irrelevant
from q35c.frontend.small_files import read_document
from q35c.vision.files import NAMES, read_parameters
from q35c.vision.parameters import VisionParameters
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


@dataclass(frozen=True, slots=True)
class Vision:
    """A checkpoint's vision tower, and how pictures and clips are prepared for it."""

    config: VisionConfig
    parameters: VisionParameters

    def to_dict(self) -> dict[str, Any]:
        """Return the `vision` of a manifest."""
        return {"config": self.config.to_dict(), "parameters": self.parameters.to_dict()}


def read_vision(checkpoint: Checkpoint) -> Vision | None:
    """Return what a checkpoint says of vision, None if it has no tower.

    Raises ConfigError where it contradicts itself or says nothing of how pictures are prepared, UnsupportedConfig by name
    for what is not computed.
    """
    config = read_vision_config(checkpoint.document, checkpoint.where or "config.json")
    if config is None:
        return None
    given = {name: read_document(checkpoint, name) for name in NAMES if name in checkpoint.files}
    parameters = read_parameters(given)
    if parameters is None:
        raise ConfigError(
            "the checkpoint has a vision tower, but does not say how pictures are prepared",
            where=checkpoint.where,
            expected=" or ".join(NAMES[:2]),
            hint="take the file from the original model, or compile the text alone",
        )
    check_agreement(config, parameters, checkpoint.where)
    return Vision(config, parameters)


def check_agreement(config: VisionConfig, parameters: VisionParameters, where: str) -> None:
    """Refuse patches that the tower does not read. Raises ConfigError."""
    read = (config.patch_size, config.temporal_patch_size, MERGE)
    made = (parameters.patch_size, parameters.temporal_patch_size, parameters.merge_size)
    if read != made:
        raise ConfigError(
            "patches are not prepared as the tower reads them",
            where=where,
            expected=f"pixels, frames and patches of a token's side {read}",
            got=made,
        )


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
