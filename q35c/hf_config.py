"""Translate a Hugging Face `config.json` into the canonical form of `ModelConfig`.

Four tables sort every key: used, only one value supported, irrelevant, and (anything else) refused.
"""

from __future__ import annotations

from typing import Any

from q35c.config import DENSE_ONLY, FULL, LINEAR, MOE_ONLY, SIZES
from q35c.errors import ConfigError, UnsupportedConfig

TEXT_TYPES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}

# Keys that name a variant of the math of which one value is implemented.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attn_output_gate": (True,),
    "output_gate_type": ("swish", "silu"),
    "hidden_act": ("silu",),
    "mamba_ssm_dtype": ("float32",),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
    "norm_topk_prob": (True,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
}
# Keys about training, storage, other towers or the host program: they cannot change the logits of
# the text tower. `auto_map` asks for code from the model directory: it is ignored, never run.
IRRELEVANT = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "dtype",
        "id2label",
        "initializer_range",
        "label2id",
        "language_model_only",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed_mtp",
        "unsloth_version",
        "use_cache",
        "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings",
        "image_token_id",
        "video_token_id",
        "vision_config",
        "vision_start_token_id",
        "vision_end_token_id",
        "audio_token_id",
    ]
)
_USED = frozenset(
    (
        *SIZES,
        *("layer_types", "full_attention_interval", "rms_norm_eps", "tie_word_embeddings"),
        *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
        *("model_type", "eos_token_id"),
    )
)
_HINTS = {
    "quantization_config": "use the unquantized (bf16, f16 or f32) checkpoint",
    "text_config": "a text config cannot hold another one",
}
_ROPE_DEFAULTS: dict[str, Any] = {
    "rope_type": "default",
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
}


def canonical_form(document: Any, where: str) -> dict[str, Any]:
    """Return the dict that `ModelConfig.from_dict` checks; refuse keys it would not know.

    Raises ConfigError for contradictions, UnsupportedConfig for unknown keys and values.
    """
    text, where = _text_tower(document, where)
    kind = text["model_type"]
    feed_forward = MOE_ONLY if TEXT_TYPES[kind] == "qwen3_5_moe" else DENSE_ONLY
    _check_keys(text, _USED | set(feed_forward), where)
    copied = {key: text[key] for key in (*SIZES, *feed_forward) if key in text}
    eos = text.get("eos_token_id")
    return {
        **copied,
        "model_type": TEXT_TYPES[kind],
        "layer_types": _layer_types(text, where),
        "rms_norm_eps": text.get("rms_norm_eps", 1e-6),
        "rope_parameters": _rope_parameters(text, where),
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
        "eos_token_ids": [] if eos is None else eos if isinstance(eos, list) else [eos],
    }


def _text_tower(document: Any, where: str) -> tuple[dict[str, Any], str]:
    """Return the text config of either kind of document and the place it was found at."""
    if not isinstance(document, dict):
        raise ConfigError("must be a JSON object", where=where)
    kind = document.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError("missing key 'model_type'", where=where)
    if kind in TEXT_TYPES:
        return document, where
    if f"{kind}_text" not in TEXT_TYPES:
        raise UnsupportedConfig(
            f"model_type {kind!r:.80} is not supported",
            where=where,
            expected="qwen3_5, qwen3_5_moe or their _text form",
        )
    text = document.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError("missing key 'text_config'", where=where)
    _check_keys(
        document, {"model_type", "text_config", "tie_word_embeddings", "eos_token_id"}, where
    )
    if text.get("model_type") != f"{kind}_text":
        raise ConfigError(
            "text_config.model_type does not belong to model_type",
            where=where,
            expected=f"{kind}_text",
            got=f"{text.get('model_type')!r:.80}",
        )
    return _inherit(document, text, where), f"{where} at text_config"


def _inherit(document: dict[str, Any], text: dict[str, Any], where: str) -> dict[str, Any]:
    """Take from the outer document what both levels may hold."""
    merged = dict(text)
    tie, outer_tie = (level.get("tie_word_embeddings") for level in (text, document))
    if None not in (tie, outer_tie) and tie is not outer_tie:
        raise ConfigError(
            "tie_word_embeddings differs between config.json and its text_config",
            where=where,
            expected=outer_tie,
            got=tie,
        )
    for key in ("tie_word_embeddings", "eos_token_id"):
        if key in document:
            merged.setdefault(key, document[key])
    return merged


def _check_keys(document: dict[str, Any], used: frozenset[str] | set[str], where: str) -> None:
    for key, value in document.items():
        if key in FIXED:
            # 0 == False in Python, so the type is compared too.
            if not any(type(value) is type(good) and value == good for good in FIXED[key]):
                raise UnsupportedConfig(
                    f"{key} is not supported",
                    where=where,
                    expected=" or ".join(repr(good) for good in FIXED[key]),
                    got=f"{value!r:.80}",
                )
        elif key not in used and key not in IRRELEVANT:
            raise UnsupportedConfig(f"unknown key {key!r:.80}", where=where, hint=_HINTS.get(key))


def _layer_types(text: dict[str, Any], where: str) -> Any:
    """Return the explicit list, or the one that the interval implies; both must agree."""
    given, interval = text.get("layer_types"), text.get("full_attention_interval")
    if interval is None and given is not None:
        return given
    interval = 4 if interval is None else interval
    layers = text.get("num_hidden_layers")
    if type(interval) is not int or interval < 1:
        raise ConfigError("bad value of 'full_attention_interval'", where=where, got=interval)
    if type(layers) is not int or not 1 <= layers <= SIZES["num_hidden_layers"]:
        return given or []  # from_dict refuses num_hidden_layers by name
    implied = [FULL if (layer + 1) % interval == 0 else LINEAR for layer in range(layers)]
    if given is not None and given != implied:
        raise ConfigError(
            "layer_types contradicts full_attention_interval", where=where, got=interval
        )
    return implied


def _rope_parameters(text: dict[str, Any], where: str) -> dict[str, Any]:
    """Merge the places where rotary parameters may stand; two that differ are refused."""
    places = [text[key] for key in ("rope_parameters", "rope_scaling") if text.get(key) is not None]
    for place in places:
        if not isinstance(place, dict):
            raise ConfigError("rope_parameters must be a JSON object", where=where)
    places.append(
        {key: text[key] for key in ("rope_theta", "partial_rotary_factor") if key in text}
    )
    merged: dict[str, Any] = {}
    for place in places:
        for key, value in place.items():
            key = "rope_type" if key == "type" else key
            if merged.setdefault(key, value) != value:
                raise ConfigError(
                    f"two values of {key!r:.80}", where=where, got=[merged[key], value]
                )
    if merged.pop("mrope_interleaved", True) is not True:
        raise UnsupportedConfig("mrope_interleaved is not supported", where=where, expected=True)
    unset = [key for key, value in merged.items() if value is None]
    for key in unset:
        del merged[key]
    return {**_ROPE_DEFAULTS, **merged}
