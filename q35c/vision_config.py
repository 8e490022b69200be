"""The configuration of the vision tower: everything that decides its shapes or math, and the tokens that stand for pictures."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from q35c.errors import UnsupportedConfig
from q35c.fields import Fields

CHANNELS, MERGE = 3, 2  # of a picture; patches of one token's side
_MAX_DIM = 1 << 16
_MAX_TOKEN = 1 << 31
_SIZES: dict[str, int] = {
    "depth": 1024,
    "hidden_size": _MAX_DIM,
    "num_heads": 1024,
    "intermediate_size": _MAX_DIM,
    "out_hidden_size": 1 << 20,
    "patch_size": 64,
    "temporal_patch_size": 16,
    "num_position_embeddings": 1 << 20,
}


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A checked vision tower. Sizes carry the names of Hugging Face's vision config, tokens those of the whole model's.

    A patch is `temporal_patch_size` frames of `patch_size` squared pixels; 2x2 patches become one token of the text model.
    The position table is a square of `num_position_embeddings` rows.
    """

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    num_position_embeddings: int
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_bytes(self) -> int:
        """Return the bytes of a patch: channels, frames, rows and columns, in this order."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2

    @property
    def table_side(self) -> int:
        """Return the rows, and the columns, of the square of learned positions."""
        return round(self.num_position_embeddings**0.5)

    def to_dict(self) -> dict[str, int]:
        """Return the canonical JSON form, which `from_dict` reads back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, document: Any, where: str = "vision config") -> VisionConfig:
        """Read the canonical form. Raises ConfigError or UnsupportedConfig."""
        given = Fields(document, where)
        tokens = [field.name for field in fields(cls) if field.name.endswith("_token_id")]
        config = cls(
            **{name: given.integer(name, 1, high) for name, high in _SIZES.items()},
            **{name: given.integer(name, 0, _MAX_TOKEN) for name in tokens},
        )
        given.finish()
        _check_supported(config, where)
        return config


def _check_supported(config: VisionConfig, where: str) -> None:
    """Refuse what is no tower, or has no kernel, by the name of the key."""

    def require(is_true: bool, key: str, expected: str) -> None:
        if not is_true:
            got = getattr(config, key)
            raise UnsupportedConfig(
                f"vision {key} is not supported", where=where, expected=expected, got=got
            )

    require(config.hidden_size % config.num_heads == 0, "hidden_size", "a multiple of num_heads")
    for key in ("hidden_size", "intermediate_size", "out_hidden_size"):
        require(getattr(config, key) % 16 == 0, key, "a multiple of 16")
    is_good = config.head_dim % 8 == 0 and 16 <= config.head_dim <= 128
    require(is_good, "num_heads", "heads of a multiple of 8 dims, from 16 to 128")
    is_square = config.table_side**2 == config.num_position_embeddings
    require(is_square, "num_position_embeddings", "a square")
