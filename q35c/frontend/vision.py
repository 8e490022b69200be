"""What a multimodal checkpoint says of its vision tower, and of how pictures and clips become what the tower reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from q35c.errors import ConfigError
from q35c.frontend.checkpoint import Checkpoint
from q35c.frontend.hf_vision import read_vision_config
from q35c.frontend.small_files import read_document
from q35c.vision.files import NAMES, read_parameters
from q35c.vision.parameters import VisionParameters
from q35c.vision_config import MERGE, VisionConfig


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
    where = checkpoint.where or "config.json"
    config = checkpoint.tower or read_vision_config(checkpoint.document, where)
    if config is None:
        return None
    if not checkpoint.where:
        return Vision(config, VisionParameters())
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
