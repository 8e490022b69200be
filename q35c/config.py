"""The configuration of the text tower: everything that decides shapes or math, and nothing else.

It is written and read in one canonical form; what a checkpoint's `config.json` says is translated by the frontend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from q35c.errors import ConfigError, UnsupportedConfig
from q35c.fields import Fields

MAX_CONTEXT = 1 << 22  # tokens that an artifact can hold
MAX_STOP_IDS = 64
LINEAR, FULL = "linear_attention", "full_attention"
_MAX_DIM = 1 << 20
_MAX_LAYERS = 1024
_YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """Rotary embedding; the optional fields belong to YaRN, None leaves them to HF's defaults."""

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float
    mrope_section: tuple[int, ...]
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON values."""
        items = {name: getattr(self, name) for name in self.__slots__}
        items["mrope_section"] = list(self.mrope_section)
        return {name: value for name, value in items.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A checked text tower. Fields carry the names of Hugging Face's text config.

    `intermediate_size` is 0 in a mixture-of-experts model; the expert fields are 0 in a dense one.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()
    intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0

    @property
    def is_moe(self) -> bool:
        return self.model_type == "qwen3_5_moe"

    @property
    def rotary_dim(self) -> int:
        """Return how many of the head's dims are rotated."""
        return int(self.head_dim * self.rope_parameters.partial_rotary_factor)

    @property
    def max_context(self) -> int:
        """Return the most tokens of a sequence: YaRN stretches the positions that the model was trained on."""
        rope = self.rope_parameters
        stretched = (rope.factor or 0) * (rope.original_max_position_embeddings or 0)
        return max(self.max_position_embeddings, int(stretched))

    def to_dict(self) -> dict[str, Any]:
        """Return the canonical JSON form, which `from_dict` reads back."""
        items = {name: getattr(self, name) for name in self.__slots__}
        for name in DENSE_ONLY if self.is_moe else MOE_ONLY:
            del items[name]
        items["rope_parameters"] = self.rope_parameters.to_dict()
        items["layer_types"] = list(self.layer_types)
        items["eos_token_ids"] = list(self.eos_token_ids)
        return items

    @classmethod
    def from_dict(cls, document: Any, where: str = "config") -> ModelConfig:
        """Read the canonical form. Raises ConfigError or UnsupportedConfig."""
        fields = Fields(document, where)
        model_type = fields.choice("model_type", ("qwen3_5", "qwen3_5_moe"))
        feed_forward = MOE_ONLY if model_type == "qwen3_5_moe" else DENSE_ONLY
        config = cls(
            model_type=model_type,
            layer_types=fields.texts("layer_types", (LINEAR, FULL), _MAX_LAYERS),
            rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0),
            rope_parameters=_read_rope(fields.nested("rope_parameters")),
            tie_word_embeddings=fields.boolean("tie_word_embeddings"),
            eos_token_ids=fields.integers("eos_token_ids", 0, 1 << 31),
            **{name: fields.integer(name, 1, high) for name, high in SIZES.items()},
            **{name: fields.integer(name, 1, _MAX_DIM) for name in feed_forward},
        )
        fields.finish()
        _check_supported(config, where)
        _check_consistent(config, where)
        return config


DENSE_ONLY = ("intermediate_size",)
MOE_ONLY = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
SIZES: dict[str, int] = {
    "vocab_size": 1 << 24,
    "hidden_size": _MAX_DIM,
    "num_hidden_layers": _MAX_LAYERS,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "linear_num_key_heads": 4096,
    "linear_num_value_heads": 4096,
    "linear_key_head_dim": 4096,
    "linear_value_head_dim": 4096,
    "linear_conv_kernel_dim": 64,
    "max_position_embeddings": 1 << 31,
}


def _read_rope(fields: Fields) -> RopeParameters:
    rope_type = fields.choice("rope_type", ("default", "yarn"))
    common = {
        "rope_type": rope_type,
        "rope_theta": fields.number("rope_theta", 1.0, 1e15),
        "partial_rotary_factor": fields.number("partial_rotary_factor", 0.0, 1.0),
        "mrope_section": fields.integers("mrope_section", 0, _MAX_DIM),
    }
    if rope_type == "default":
        fields.finish()
        return RopeParameters(**common)
    rope = RopeParameters(
        **common,
        factor=fields.number("factor", 1.0, 1e6),
        original_max_position_embeddings=fields.integer(
            "original_max_position_embeddings", 1, 1 << 31
        ),
        truncate=fields.boolean("truncate", default=None),
        **{key: fields.number(key, 0.0, 1e6, default=None) for key in _YARN_KEYS},
    )
    fields.finish()
    return rope


def _check_consistent(config: ModelConfig, where: str) -> None:
    """Refuse a configuration that no model can have."""

    def require(is_true: bool, what: str, expected: object, got: object) -> None:
        if not is_true:
            raise ConfigError(what, where=where, expected=expected, got=got)

    count = len(config.layer_types)
    require(
        count == config.num_hidden_layers,
        "layer_types does not name every layer",
        config.num_hidden_layers,
        count,
    )
    require(
        config.num_attention_heads % config.num_key_value_heads == 0,
        "num_attention_heads is not a multiple of num_key_value_heads",
        f"a multiple of {config.num_key_value_heads}",
        config.num_attention_heads,
    )
    require(
        config.num_experts_per_tok <= config.num_experts,
        "num_experts_per_tok exceeds num_experts",
        f"at most {config.num_experts}",
        config.num_experts_per_tok,
    )
    require(
        all(token < config.vocab_size for token in config.eos_token_ids),
        "eos_token_id is outside the vocabulary",
        f"below {config.vocab_size}",
        list(config.eos_token_ids),
    )
    _check_rope(config, require)


def _check_rope(config: ModelConfig, require: Any) -> None:
    section = config.rope_parameters.mrope_section
    pairs = config.rotary_dim // 2
    require(len(section) == 3, "mrope_section must have three axes (t, h, w)", 3, len(section))
    require(
        sum(section) == pairs,
        "mrope_section does not add up to half the rotary dims",
        pairs,
        f"{list(section)}, sum {sum(section)}",
    )
    # Axis a takes the pairs a, a + 3, a + 6, ...: its last pair must exist.
    for axis, size in enumerate(section[1:], start=1):
        require(
            axis + 3 * (size - 1) < pairs,
            f"mrope_section[{axis}] does not fit when interleaved",
            f"at most {len(range(axis, pairs, 3))}",
            size,
        )


def _check_supported(config: ModelConfig, where: str) -> None:
    """Refuse what is legal but has no kernel, by the name of the key."""

    def require(is_true: bool, key: str, expected: str, got: object) -> None:
        if not is_true:
            raise UnsupportedConfig(
                f"{key} is not supported", where=where, expected=expected, got=got
            )

    for key in ("hidden_size", "intermediate_size", *MOE_ONLY[2:]):
        size = getattr(config, key)
        require(size % 16 == 0, key, "a multiple of 16", size)
    for key in ("head_dim", "linear_key_head_dim", "linear_value_head_dim"):
        size = getattr(config, key)
        is_good = size % 16 == 0 and 32 <= size <= 256
        require(is_good, key, "a multiple of 16 from 32 to 256", size)
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    require(
        value_heads % key_heads == 0 and value_heads // key_heads <= 4,
        "linear_num_value_heads",
        f"1 to 4 times linear_num_key_heads = {key_heads}",
        value_heads,
    )
    taps = config.linear_conv_kernel_dim
    require(2 <= taps <= 4, "linear_conv_kernel_dim", "2 to 4", taps)
    section = config.rope_parameters.mrope_section
    require(
        0 not in section,
        "rope_parameters.mrope_section",
        "at least one pair per axis",
        list(section),
    )
    rotary = config.rotary_dim
    factor = config.rope_parameters.partial_rotary_factor
    require(
        2 <= rotary < config.head_dim and rotary % 2 == 0,
        "rope_parameters.partial_rotary_factor",
        "an even number of rotary dims, fewer than the head's",
        f"{factor} of head_dim {config.head_dim}",
    )
