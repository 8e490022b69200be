"""Tiny random checkpoints in Hugging Face's layout, and their eager logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from q35c.config import ModelConfig
from q35c.frontend.hf_config import read_hf_config
from q35c.frontend.tensors import expected_tensors, parts_of

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("an", "d"), ("o", "u")]
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_COMMON: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
    "hidden_act": "silu",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
_KINDS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3_5_text", "intermediate_size": 112},
    "moe": {
        "model_type": "qwen3_5_moe_text",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
    },
}
# A shared expert of another size than the routed ones is computed apart from them.
_KINDS["moe-apart"] = {**_KINDS["moe"], "shared_expert_intermediate_size": 32}
Layout = Literal["text", "multimodal"]


def config_document(kind: str = "dense", **overrides: Any) -> dict[str, Any]:
    """Return the `config.json` of a tiny text model; an override of None removes the key."""
    document = {**_COMMON, **_KINDS[kind], **overrides}
    return {key: value for key, value in document.items() if value is not None}


def multimodal_document(text: dict[str, Any]) -> dict[str, Any]:
    """Wrap a text config as the multimodal checkpoints do."""
    outer = text["model_type"].removesuffix("_text")
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": outer,
        "text_config": text,
        "vision_config": {"model_type": outer, "depth": 1},
        "image_token_id": 300,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "transformers_version": "5.23.0",
    }


def random_weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Draw weights by canonical name that keep activations near one, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in expected_tensors(config).items():
        drawn = torch.randn(shape, generator=generator)
        if name.endswith("A_log"):
            drawn = torch.rand(shape, generator=generator).mul(4).add(0.05).log()
        elif name.endswith("linear_attn.norm.weight"):
            drawn = 1 + 0.2 * drawn
        elif len(shape) == 1:
            drawn = 0.2 * drawn
        elif name.endswith("conv1d.weight"):
            drawn = 0.5 * drawn
        elif name != "embed_tokens.weight":
            drawn = drawn / shape[-1] ** 0.5
        weights[name] = drawn
    return weights


def stored_weights(
    config: ModelConfig, weights: dict[str, torch.Tensor], prefix: str, is_split: bool
) -> dict[str, torch.Tensor]:
    """Rename canonical tensors to stored names, experts one by one if asked for."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        parts = parts_of(name, tuple(tensor.shape)) if is_split else []
        for row, names in zip(tensor, parts, strict=False):
            pieces = row.split([shape[0] for shape in names.values()])
            stored.update({prefix + part: piece for part, piece in zip(names, pieces, strict=True)})
        if not parts:
            stored[name if name == "lm_head.weight" else prefix + name] = tensor
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def save_shards(path: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Write one file, or several with an index."""
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata)
        return
    placed: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, path / file, metadata)
        placed.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(
    path: Path,
    kind: str = "dense",
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "text",
    shards: int = 1,
    is_split: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint directory and return it.

    `overrides` replace keys of the text config. `layout="multimodal"` wraps config and names as the
    multimodal checkpoints do, with a vision and a draft tensor beside; `is_split` stores experts
    one by one, as transformers saves them.
    """
    path.mkdir(parents=True, exist_ok=True)
    document = config_document(kind, **overrides)
    config = read_hf_config(document)
    is_multimodal = layout == "multimodal"
    prefix = "model.language_model." if is_multimodal else "model."
    tensors = stored_weights(config, random_weights(config, seed), prefix, is_split)
    if is_multimodal:
        tensors["model.visual.patch_embed.proj.weight"] = torch.zeros(3, 2)
        tensors["mtp.fc.weight"] = torch.zeros(2, 3)
    save_shards(path, {name: tensor.to(dtype) for name, tensor in tensors.items()}, shards)
    written = multimodal_document(document) if is_multimodal else document
    (path / "config.json").write_text(json.dumps(written, indent=1))
    write_tokenizer(path)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file, which need not be there."""
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | changes))


def write_tokenizer(path: Path) -> None:
    """Write a byte-level BPE tokenizer of 266 tokens with its companions."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [left + right for left, right in _MERGES]
    words = [*alphabet, *SPECIAL_TOKENS, *merged]
    vocab = {token: index for index, token in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL_TOKENS[2]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))


def eager_logits(path: Path, ids: list[int] | np.ndarray) -> np.ndarray:
    """Run transformers' eager model in float32 on the stored weights: logits [S, V]."""
    return eager_model_logits(eager_model(path), ids)


def eager_model(path: Path) -> torch.nn.Module:
    """Load the oracle that `q35c verify` uses: transformers' own eager model in float32."""
    from q35c.verify import load_oracle

    return load_oracle(path)


def eager_model_logits(
    model: torch.nn.Module, ids: list[int] | np.ndarray, positions: np.ndarray | None = None
) -> np.ndarray:
    """Run a loaded model on one sequence; `positions` is [3, S] (t, h, w), by default 0..S-1."""
    tokens = torch.as_tensor(np.asarray(ids), dtype=torch.long)[None]
    where = None if positions is None else torch.as_tensor(positions, dtype=torch.long)[:, None]
    with torch.no_grad():
        return model(tokens, position_ids=where, use_cache=False).logits[0].numpy()
