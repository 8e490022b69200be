"""Read a Hugging Face `config.json`: translate it into the canonical form of `ModelConfig`.

Every key is used here, or has one supported value, or is irrelevant (`hf_keys`); any other key that says something is refused
by name, because an ignored key is a model that computes something else. null is "not given".
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from q35c.config import DENSE_ONLY, FULL, LINEAR, MOE_ONLY, SIZES, ModelConfig
from q35c.errors import ConfigError, OptionError, UnsupportedConfig
from q35c.frontend.hf_keys import FIXED, REFUSED, SAMPLING, is_absent, is_irrelevant

MAX_CONFIG_BYTES = 1 << 20
TEXT_TYPES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}

# Rotary parameters that may also stand beside the others of the text config.
FLAT_ROPE = (
    "rope_theta", "partial_rotary_factor", "rope_type", "mrope_section", "mrope_interleaved",
)  # fmt: skip
_USED = frozenset(
    (
        *SIZES,
        *("layer_types", "full_attention_interval", "rms_norm_eps", "tie_word_embeddings"),
        *("rope_parameters", "rope_scaling", *FLAT_ROPE),
        *("model_type", "eos_token_id"),
    )
)
# Objects whose own keys are read.
_NESTED = ("text_config", "rope_parameters", "rope_scaling")
_ROPE_DEFAULTS: dict[str, Any] = {
    "rope_type": "default",
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
}


def read_hf_config(
    document: Any, where: str = "config.json", ignore: Collection[str] = ()
) -> ModelConfig:
    """Return what a `config.json` says: a text config, or a multimodal one's text tower.

    `ignore` names keys that are read as if they were not there. Raises ConfigError where the document is malformed or
    contradicts itself, UnsupportedConfig for every key or value that q35c does not implement, OptionError for a key to ignore
    that is not there.
    """
    return ModelConfig.from_dict(_canonical_form(document, where, ignore), where)


def hf_text_config(config: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments of Hugging Face's text config class for this model."""
    items: Mapping[str, Any] = config.to_dict()
    renamed = {
        key: value for key, value in items.items() if key not in ("model_type", "eos_token_ids")
    }
    rope = dict(renamed["rope_parameters"], mrope_interleaved=True)
    eos = list(config.eos_token_ids) or None
    return {**renamed, "rope_parameters": rope, "eos_token_id": eos}


def _canonical_form(document: Any, where: str, ignore: Collection[str]) -> dict[str, Any]:
    """Return the dict that `ModelConfig.from_dict` checks; refuse keys it would not know."""
    if not isinstance(document, dict):
        raise ConfigError("must be a JSON object", where=where)
    for key in sorted(set(ignore) - set(_keys(document))):
        raise OptionError(f"{where} has no key {key!r:.80}", where="ignore_config")
    text, where = _text_tower(_given(document, ignore), where)
    kind = text["model_type"]
    feed_forward = MOE_ONLY if TEXT_TYPES[kind] == "qwen3_5_moe" else DENSE_ONLY
    _check_keys(text, _USED | set(feed_forward), where)
    copied = {key: text[key] for key in (*SIZES, *feed_forward) if key in text}
    return {
        **copied,
        "model_type": TEXT_TYPES[kind],
        "layer_types": _layer_types(text, where),
        "rms_norm_eps": text.get("rms_norm_eps", 1e-6),
        "rope_parameters": _rope_parameters(text, where),
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
        "eos_token_ids": token_ids(text.get("eos_token_id")),
    }


def token_ids(value: Any) -> list[Any]:
    """Return the ids of a key that may hold one, several or none; -1 stands for none."""
    listed = value if isinstance(value, list) else [value]
    return [item for item in listed if item is not None and not (type(item) is int and item == -1)]


def sampling_keys(document: Any) -> list[str]:
    """Return the keys of a config.json that say how to sample, which generation_config.json does."""
    text = document.get("text_config")
    levels = [document, text] if isinstance(text, dict) else [document]
    return sorted(
        {key for level in levels for key in SAMPLING & set(level) if level[key] is not None}
    )


def _given(document: dict[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """Return what says something: what is neither null nor to be ignored, also inside the objects that are read."""
    return {
        key: _given(value, ignore) if key in _NESTED and isinstance(value, dict) else value
        for key, value in document.items()
        if value is not None and key not in ignore
    }


def _keys(document: dict[str, Any]) -> Iterator[str]:
    for key, value in document.items():
        yield key
        if key in _NESTED and isinstance(value, dict):
            yield from _keys(value)


def _text_tower(document: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """Return the text config of either kind of document and the place it was found at."""
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
    if text.get("model_type") not in (kind, f"{kind}_text"):
        raise ConfigError(
            "text_config.model_type does not belong to model_type",
            where=where,
            expected=f"{kind}_text",
            got=f"{text.get('model_type')!r:.80}",
        )
    merged = {**_inherit(document, text, where), "model_type": f"{kind}_text"}
    return merged, f"{where} at text_config"


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
    if outer_tie is not None:
        merged["tie_word_embeddings"] = outer_tie
    ends = [token_ids(level.get("eos_token_id")) for level in (text, document)]
    merged["eos_token_id"] = ends[0] + [token for token in ends[1] if token not in ends[0]]
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
        elif key in used or is_irrelevant(key):
            continue
        elif key in REFUSED or not is_absent(value):
            consent = f'if it cannot change what the model computes: ignore_config=["{key:.80}"]'
            hint = REFUSED.get(key) or consent
            raise UnsupportedConfig(f"unknown key {key!r:.80}", where=where, hint=hint)


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
    places = [text[key] for key in ("rope_parameters", "rope_scaling") if key in text]
    for place in places:
        if not isinstance(place, dict):
            raise ConfigError("rope_parameters must be a JSON object", where=where)
    places.append({key: text[key] for key in FLAT_ROPE if key in text})
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
    return {**_ROPE_DEFAULTS, **merged}
