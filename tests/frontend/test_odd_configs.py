"""Odd but real config.json: keys that cannot matter, keys in other places, and consent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedConfig

from q35c.compile import check_limits
from q35c.errors import OptionError, UnsupportedConfig
from q35c.frontend.checkpoint import open_checkpoint
from q35c.frontend.hf_config import read_hf_config
from q35c.frontend.hf_keys import FIXED, is_irrelevant
from q35c.frontend.trace import hf_config
from tests.models import (
    config_document,
    edit_json,
    multimodal_document,
    write_checkpoint,
)


@pytest.mark.parametrize(
    "keys",
    [
        {
            "unsloth_fixed": True,
            "model_name": "someone/finetune",
            "transformers.js_config": {"a": 1},
        },
        {
            "_attn_implementation_autoset": True,
            "attn_implementation": "sdpa",
            "use_bfloat16": False,
        },
        {"pruned_heads": {}, "is_decoder": True, "num_labels": 2, "task_specific_params": {"a": 1}},
        {"max_length": 20, "temperature": 0.6, "generation_config": {"top_k": 3}},
        {"surprise": None, "other": False, "empty": [], "nothing": {}, "blank": ""},
        {
            "attention_bias": None,
            "quantization_config": None,
            "rope_scaling": None,
            "num_experts": None,
        },
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_keys_that_cannot_matter(keys: dict[str, Any]) -> None:
    plain = read_hf_config(config_document())
    assert read_hf_config({**config_document(), **keys}) == plain
    outer = multimodal_document({**config_document(), **keys})
    assert read_hf_config({**keys, **outer}) == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [("qkv_bias", False), ("router_jitter_noise", 0.0), ("moe_router_topk", 2), ("scale", 0.5),
     ("quantization_config", {}), ("pruned_heads", {"0": [1]}), ("add_cross_attention", True)],
)  # fmt: skip
def test_keys_that_may_change_the_numbers_need_consent(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedConfig, match=key):
        read_hf_config({**config_document(), key: value})
    config = read_hf_config({**config_document(), key: value}, ignore=[key])
    assert config == read_hf_config(config_document())


def test_consent_reaches_nested_keys_and_names_its_own_mistakes(
    tmp_path: Path,
) -> None:
    model = write_checkpoint(tmp_path)
    plain = open_checkpoint(model).config
    edit_json(model / "config.json", surprise=1)
    rope = json.loads((model / "config.json").read_text())["rope_parameters"]
    edit_json(model / "config.json", rope_parameters={**rope, "novel": 2})
    assert open_checkpoint(model, ignore_config=["surprise", "novel"]).config == plain
    with pytest.raises(OptionError, match="no key 'surprize'"):
        open_checkpoint(model, ignore_config=["surprize"])


def test_every_key_of_the_reference_is_classified() -> None:
    """A key that the reference's own classes write must not be unknown here."""
    used = set(config_document()) | set(config_document("moe")) | {"layer_types", "rope_parameters"}
    written = set(PreTrainedConfig().to_dict()) | set(GenerationConfig().to_dict())
    for kind in ("dense", "moe"):
        written |= set(hf_config(read_hf_config(config_document(kind))).to_dict())
    assert {
        key for key in written if not (key in used or key in FIXED or is_irrelevant(key))
    } == set()


def test_the_text_type_may_lack_its_suffix_and_rope_may_lie_flat() -> None:
    text = config_document("moe")
    flat = {key: value for key, value in text.items() if key != "rope_parameters"}
    flat |= text["rope_parameters"] | {"model_type": "qwen3_5_moe"}
    outer = multimodal_document(text) | {"text_config": flat}
    assert read_hf_config(outer) == read_hf_config(text)


def test_null_on_one_level_takes_the_other_and_end_tokens_add_up() -> None:
    text = config_document() | {"tie_word_embeddings": None, "eos_token_id": [3]}
    outer = multimodal_document(config_document()) | {"text_config": text, "eos_token_id": [4, 3]}
    config = read_hf_config(outer | {"tie_word_embeddings": True})
    assert config.tie_word_embeddings and config.eos_token_ids == (3, 4)


def test_yarn_stretches_the_context() -> None:
    rope = config_document()["rope_parameters"]
    yarn = {**rope, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    config = read_hf_config(config_document(rope_parameters=yarn))
    assert check_limits(config, 16_384, 1).context == 16_384
    with pytest.raises(OptionError, match="1 to 16384"):
        check_limits(config, 16_385, 1)
    with pytest.raises(OptionError, match="1 to 4096"):
        check_limits(read_hf_config(config_document()), 4097, 1)
