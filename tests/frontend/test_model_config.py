"""ModelConfig: every refusal by name, both document kinds, and the family table."""

import json
from typing import Any

import pytest
import torch

from q35c.config import FULL, LINEAR, ModelConfig
from q35c.errors import ConfigError, OptionError, UnsupportedConfig
from q35c.frontend import family
from q35c.frontend.hf_config import hf_text_config, read_hf_config
from q35c.frontend.tensors import expected_tensors
from q35c.frontend.trace import causal_lm_class, hf_config
from tests.models import config_document, multimodal_document

ROPE = config_document()["rope_parameters"]


def rope(**changes: Any) -> dict[str, Any]:
    merged = {**ROPE, **changes}
    return {"rope_parameters": {key: value for key, value in merged.items() if value is not None}}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}

UNSUPPORTED = {
    "attention_bias": {"attention_bias": True},
    "attn_output_gate": {"attn_output_gate": False},
    "output_gate_type": {"output_gate_type": "sigmoid"},
    "hidden_act": {"hidden_act": "gelu"},
    "mamba_ssm_dtype": {"mamba_ssm_dtype": "bfloat16"},
    "mlp_only_layers": {"mlp_only_layers": [0]},
    "decoder_sparse_step": {"decoder_sparse_step": 2},
    "norm_topk_prob": {"norm_topk_prob": False},
    "use_sliding_window": {"use_sliding_window": True},
    "sliding_window": {"sliding_window": 1024},
    "chunk_size_feed_forward": {"chunk_size_feed_forward": False},
    "quantization_config": {"quantization_config": {"bits": 4}},
    "unknown_key": {"unknown_key": 1},
    "text_config": {"text_config": {}},
    "num_experts": {"num_experts": 8},
    "model_type": {"model_type": "llama"},
    "partial_rotary_factor ": rope(partial_rotary_factor=1.0, mrope_section=[6, 5, 5]),
    "layer_types": {"full_attention_interval": None, "layer_types": ["mamba"] * 4},
    "hidden_size": {"hidden_size": 72},
    "intermediate_size": {"intermediate_size": 100},
    "head_dim": {"head_dim": 40},
    "linear_key_head_dim": {"linear_key_head_dim": 16},
    "linear_value_head_dim": {"linear_value_head_dim": 272},
    "linear_num_value_heads": {"linear_num_value_heads": 3},
    "linear_num_value_heads ": {"linear_num_value_heads": 10},
    "linear_conv_kernel_dim": {"linear_conv_kernel_dim": 5},
    "linear_conv_kernel_dim ": {"linear_conv_kernel_dim": 1},
    "partial_rotary_factor": rope(partial_rotary_factor=0.1),
    "mrope_section": rope(mrope_section=[4, 0, 0]),
    "rope_type": rope(rope_type="llama3"),
    "rope_type ": rope(rope_type="dynamic"),
    "mrope_interleaved": rope(mrope_interleaved=False),
    "factor": rope(factor=2.0),
    "short_factor": rope(**YARN, short_factor=[1.0]),
}
MALFORMED = {
    "vocab_size": {"vocab_size": 0},
    "hidden_size": {"hidden_size": True},
    "hidden_size ": {"hidden_size": 64.0},
    "num_hidden_layers": {"num_hidden_layers": -1},
    "num_hidden_layers ": {"num_hidden_layers": 1_000_000_000},
    "num_hidden_layers  ": {"num_hidden_layers": "4"},
    "head_dim": {"head_dim": None},
    "intermediate_size": {"intermediate_size": None},
    "linear_num_key_heads": {"linear_num_key_heads": 0},
    "num_attention_heads": {"num_attention_heads": 3},
    "max_position_embeddings": {"max_position_embeddings": 0},
    "rms_norm_eps": {"rms_norm_eps": "1e-6"},
    "rms_norm_eps ": {"rms_norm_eps": -1e-6},
    "tie_word_embeddings": {"tie_word_embeddings": 0},
    "eos_token_id": {"eos_token_id": 307},
    "eos_token_ids": {"eos_token_id": [True]},
    "layer_types": {"layer_types": [LINEAR] * 3, "full_attention_interval": None},
    "layer_types ": {"layer_types": "linear_attention", "full_attention_interval": None},
    "layer_types  ": {"layer_types": [FULL] * 4},
    "full_attention_interval": {"full_attention_interval": 0},
    "rope_theta": rope(rope_theta=None),
    "rope_theta ": rope(rope_theta=-1.0),
    "rope_theta  ": {"rope_theta": 5.0},
    "rope_parameters": {"rope_parameters": [1]},
    "mrope_section": rope(mrope_section=[1, 1, 1]),
    "mrope_section ": rope(mrope_section=[2, 2]),
    "mrope_section[2]": rope(mrope_section=[1, 1, 2]),
    "mrope_section  ": rope(mrope_section=[5, -1, 0]),
    "original_max_position_embeddings": rope(rope_type="yarn", factor=4.0),
    "factor": rope(rope_type="yarn", original_max_position_embeddings=1024),
    "truncate": rope(**YARN, truncate=1),
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_is_refused_by_name(key: str) -> None:
    with pytest.raises(UnsupportedConfig, match=key.strip()):
        read_hf_config(config_document(**UNSUPPORTED[key]))


@pytest.mark.parametrize("key", MALFORMED)
def test_malformed_or_contradictory_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_hf_config(config_document(**MALFORMED[key]))
    assert key.strip() in str(caught.value)
    assert type(caught.value) is ConfigError


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"num_experts_per_tok": 9}, ConfigError),
        ({"num_experts_per_tok": 0}, ConfigError),
        ({"num_experts": None}, ConfigError),
        ({"moe_intermediate_size": 40}, UnsupportedConfig),
        ({"shared_expert_intermediate_size": 40}, UnsupportedConfig),
        ({"intermediate_size": 64}, UnsupportedConfig),
    ],
    ids=str,
)
def test_expert_fields_are_checked(changes: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_hf_config(config_document("moe", **changes))
    assert type(caught.value) is kind
    assert next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize("document", [None, [], "x", 1, {}, {"model_type": 3}], ids=repr)
def test_a_document_of_another_kind_is_malformed(document: Any) -> None:
    with pytest.raises(ConfigError):
        read_hf_config(document)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_multimodal_document_gives_the_same_text_tower(kind: str) -> None:
    text = config_document(kind)
    assert read_hf_config(multimodal_document(text)) == read_hf_config(text)


@pytest.mark.parametrize(
    ("outer", "kind", "message"),
    [
        ({"text_config": None}, ConfigError, "text_config"),
        ({"model_type": "qwen3_5_moe"}, ConfigError, "model_type"),
        ({"tie_word_embeddings": True}, ConfigError, "tie_word_embeddings"),
        ({"novel": 1}, UnsupportedConfig, "novel"),
        ({"quantization_config": {}}, UnsupportedConfig, "quantization_config"),
        ({"hidden_size": 64}, UnsupportedConfig, "hidden_size"),
    ],
    ids=str,
)
def test_outer_document_is_checked(
    outer: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_hf_config({**multimodal_document(config_document()), **outer})
    assert type(caught.value) is kind


def test_outer_document_may_hold_the_tie_and_the_end_token() -> None:
    text = config_document(tie_word_embeddings=None, eos_token_id=None)
    outer = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": True}
    config = read_hf_config({**outer, "eos_token_id": [3, 4]})
    assert config.tie_word_embeddings and config.eos_token_ids == (3, 4)


def test_irrelevant_keys_change_nothing() -> None:
    noise = {
        "architectures": ["X"],
        "auto_map": {"AutoModel": "evil.Model"},
        "bos_token_id": None,
        "dtype": "bfloat16",
        "initializer_range": 7.0,
        "mtp_num_hidden_layers": 1,
        "attn_output_gate": True,
        "output_gate_type": "swish",
        "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [],
        "use_cache": False,
    }
    assert read_hf_config(config_document() | noise) == read_hf_config(config_document())


def test_layer_types_may_be_listed_or_implied() -> None:
    listed = [LINEAR, LINEAR, LINEAR, FULL]
    implied = read_hf_config(config_document())
    assert implied.layer_types == tuple(listed)
    both = config_document(layer_types=listed)
    assert read_hf_config(both) == implied
    neither = config_document(full_attention_interval=None)
    assert read_hf_config(neither) == implied
    free = config_document(layer_types=[FULL, LINEAR] * 2, full_attention_interval=None)
    assert read_hf_config(free).layer_types == (FULL, LINEAR, FULL, LINEAR)


def test_rope_parameters_may_stand_in_their_older_places() -> None:
    inner = {key: ROPE[key] for key in ("mrope_section",)}
    document = config_document(
        rope_parameters=None, rope_theta=1e4, partial_rotary_factor=0.25,
        rope_scaling={"type": "default", **inner},
    )  # fmt: skip
    assert read_hf_config(document) == read_hf_config(config_document())


def test_yarn_is_read() -> None:
    config = read_hf_config(config_document(**rope(**YARN, beta_fast=16, truncate=False)))
    read = config.rope_parameters
    assert (read.factor, read.beta_fast, read.truncate, read.mscale) == (4.0, 16.0, False, None)
    assert read.original_max_position_embeddings == 1024


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_canonical_form_round_trips_through_json(kind: str) -> None:
    config = read_hf_config(config_document(kind, **rope(**YARN)))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UnsupportedConfig, match="surplus"):
        ModelConfig.from_dict(config.to_dict() | {"surplus": 1})


@pytest.mark.parametrize("key", read_hf_config(config_document("moe")).to_dict())
def test_canonical_form_needs_every_key(key: str) -> None:
    document = read_hf_config(config_document("moe")).to_dict()
    del document[key]
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dict(document)


def test_family_lists_the_eight_sizes() -> None:
    sizes = ["0.8b", "2b", "4b", "9b", "27b", "35b-a3b", "122b-a10b", "397b-a17b"]
    assert family.names() == tuple(f"qwen3.5-{size}" for size in sizes)
    with pytest.raises(OptionError, match=r"qwen3\.5-7b"):
        family.load("qwen3.5-7b")


@pytest.mark.parametrize("name", family.names())
def test_family_matches_transformers_shapes(name: str) -> None:
    """Both sides derive every parameter's shape from the config independently."""
    config = family.load(name)
    with torch.device("meta"):
        model = causal_lm_class(config)(hf_config(config))
    parameters = {key.removeprefix("model."): tuple(p.shape) for key, p in model.named_parameters()}
    assert parameters == expected_tensors(config)


def test_family_sizes_count_their_parameters() -> None:
    counts = {name: sum(map(size, expected_tensors(family.load(name)).values()))
              for name in family.names()}  # fmt: skip
    assert 0.7e9 < counts["qwen3.5-0.8b"] < 0.9e9
    assert 34e9 < counts["qwen3.5-35b-a3b"] < 36e9
    assert 390e9 < counts["qwen3.5-397b-a17b"] < 400e9


def size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def test_transformers_gets_every_field() -> None:
    config = read_hf_config(config_document("moe", **rope(**YARN)))
    made = hf_config(config)
    for key, value in hf_text_config(config).items():
        assert getattr(made, key) == value, key
