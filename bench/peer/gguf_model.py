"""Write a model as a GGUF file for llama.cpp: a checkpoint's weights, or drawn ones of a family shape.

    python -m peer.gguf_model qwen3.5-0.8b out.gguf
    python -m peer.gguf_model q35c/demo/model out.gguf --type f32

Matrices are stored in one float type, and llama-quantize makes the rest from that file. The mapping is
that of llama.cpp's own converter (`conversion/qwen.py`). The tokenizer is a directory's, for servers; a family
shape has none, only a count of tokens.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from q35c.config import FULL, ModelConfig
from q35c.frontend.checkpoint import Checkpoint, open_checkpoint
from q35c.progress import Progress

Read = Callable[[], np.ndarray]
_VALUE_HEAD_AXIS = {"in_proj_z": 0, "in_proj_a": 0, "in_proj_b": 0, "out_proj": 1}
_TYPES = {"f32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the file: its shape as numpy sees it, and a function that reads it as float32."""

    name: str
    shape: tuple[int, ...]
    read: Read


def list_tensors(checkpoint: Checkpoint) -> Iterator[Tensor]:
    """Yield every tensor of the model under llama.cpp's name and in its layout."""
    config = checkpoint.config
    names = gguf.get_tensor_name_map(_architecture(config), config.num_hidden_layers)
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        if name.endswith(".experts.gate_up_proj"):
            yield from _gate_and_up(checkpoint, name, names)
            continue
        target = _file_name(names, name)
        if name.endswith("conv1d.weight"):
            shape = (shape[0], shape[2])
        elif name.endswith("shared_expert_gate.weight"):
            shape = (shape[1],)
        yield Tensor(target, shape, _reader(checkpoint, name, shape))


def write_model(source: str, out: Path, dtype: str = "bf16") -> None:
    """Write the whole model, tensor by tensor; `source` is a model directory or a family name."""
    checkpoint = open_source(source)
    tensors = list(list_tensors(checkpoint))
    kinds = [tensor_type(tensor, _TYPES[dtype]) for tensor in tensors]
    writer = begin_file(out, source, checkpoint.config, tensors, kinds)
    with Progress() as progress:
        for index, (tensor, kind) in enumerate(zip(tensors, kinds, strict=True)):
            progress(f"writing {out.name}", index / len(tensors))
            writer.write_tensor_data(gguf.quants.quantize(tensor.read(), kind))
    writer.close()


def open_source(source: str) -> Checkpoint:
    """Open a model directory, or draw the weights of a family name."""
    return open_checkpoint(source, "auto" if Path(source).exists() else "dummy")


def begin_file(
    out: Path,
    source: str,
    config: ModelConfig,
    tensors: Sequence[Tensor],
    kinds: Sequence[gguf.GGMLQuantizationType],
) -> gguf.GGUFWriter:
    """Write everything before the tensors' data, which must follow in the same order."""
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[_architecture(config)])
    add_metadata(writer, config)
    add_tokenizer(writer, Path(source), config.vocab_size)
    for tensor, kind in zip(tensors, kinds, strict=True):
        size = stored_size(tensor, kind)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def stored_size(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> int:
    """Return a tensor's bytes in a type."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return prod(tensor.shape) // block * block_bytes


def tensor_type(tensor: Tensor, matrix: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """Return how a tensor is stored: vectors, the conv's taps and the router are always in f32."""
    is_small = len(tensor.shape) < 2 or "conv1d" in tensor.name or "gate_inp" in tensor.name
    return gguf.GGMLQuantizationType.F32 if is_small else matrix


def add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Write the hyperparameters."""
    writer.add_name("q35c benchmark")
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size or config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_dimension_sections([*config.rope_parameters.mrope_section, 0])
    writer.add_rope_freq_base(config.rope_parameters.rope_theta)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(config.layer_types.index(FULL) + 1)
    if config.is_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Write a directory's byte-level BPE, padded to the embedding's rows, or say that there is none."""
    path = directory / "tokenizer.json"
    if not path.exists():
        writer.add_tokenizer_model("none")
        return
    document = json.loads(path.read_text())
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    for token, number in document["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for added in document["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = document["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])


def _architecture(config: ModelConfig) -> gguf.MODEL_ARCH:
    return gguf.MODEL_ARCH.QWEN35MOE if config.is_moe else gguf.MODEL_ARCH.QWEN35


def _file_name(names: Any, name: str) -> str:
    """Return llama.cpp's name of one of our tensors."""
    stored = name if name.startswith("lm_head") else f"model.{name}"
    stored = stored.replace("linear_attn.dt_bias", "linear_attn.dt_proj.bias")
    if re.search(r"\.experts\.\w+$", stored):
        stored += ".weight"
    found = names.get_name(stored, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"llama.cpp has no name for tensor {name!r}")
    return found


def _gate_and_up(checkpoint: Checkpoint, name: str, names: Any) -> Iterator[Tensor]:
    """Yield the stacked experts' two halves, which llama.cpp stores apart."""
    experts, rows, hidden = checkpoint.shape(name)
    width = rows // 2
    for half, leaf in enumerate(("gate_proj", "up_proj")):
        target = _file_name(names, name.replace("gate_up_proj", leaf))

        def read(half: int = half) -> np.ndarray:
            return checkpoint.read(name)[:, half * width : (half + 1) * width]

        yield Tensor(target, (experts, width, hidden), read)


def _reader(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Read:
    def read() -> np.ndarray:
        data = checkpoint.read(name).reshape(shape)
        if "linear_attn." in name:
            return _linear_attention(data, name.rpartition("linear_attn.")[2], checkpoint.config)
        # the file's norms multiply by the weight itself, the checkpoint's by 1 + weight
        return data + 1 if name.endswith("norm.weight") else data

    return read


def _linear_attention(data: np.ndarray, leaf: str, config: ModelConfig) -> np.ndarray:
    """Return a linear attention tensor with its value heads in llama.cpp's order."""
    part = leaf.partition(".")[0]
    keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    if leaf == "A_log":
        return _tile_heads(-np.exp(data), 0, config)
    if part in ("in_proj_qkv", "conv1d"):
        return np.concatenate([data[:keys], _tile_heads(data[keys:], 0, config)])
    if part in _VALUE_HEAD_AXIS:
        return _tile_heads(data, _VALUE_HEAD_AXIS[part], config)
    return _tile_heads(data, 0, config) if leaf == "dt_bias" else data


def _tile_heads(data: np.ndarray, axis: int, config: ModelConfig) -> np.ndarray:
    """Reorder value heads so that head h uses key head `h % key heads`, not `h // (their ratio)`."""
    groups = config.linear_num_key_heads
    each = config.linear_num_value_heads // groups
    before, after = data.shape[:axis], data.shape[axis + 1 :]
    split = data.reshape(*before, groups, each, -1, *after)
    return np.ascontiguousarray(split.swapaxes(axis, axis + 1)).reshape(data.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="a model directory, or a family name for random weights")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=sorted(_TYPES), default="bf16")
    options = parser.parse_args()
    write_model(options.source, options.out, options.type)


if __name__ == "__main__":
    main()
