"""Write a Hugging Face checkpoint of a family shape with random weights, for the peers that read one.

    python -m peer.checkpoint_model qwen3.5-0.8b out-directory --tokenizer q35c/demo/model

It is the multimodal form, which onnxruntime-genai's builder asks for, with a vision tower as small as can
be. The weights are those that `q35c compile NAME --load-format dummy` draws. Any tokenizer will do, as all
peers are given token ids; it is padded, so that servers have a text for every id that such weights choose.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from q35c.config import ModelConfig
from q35c.frontend.checkpoint import open_checkpoint
from q35c.frontend.hf_config import hf_text_config

_TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja")
_VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}


def write_checkpoint(name: str, directory: Path, tokenizer: Path) -> None:
    """Write config, tokenizer and bf16 weights of the family shape `name`."""
    checkpoint = open_checkpoint(name, "dummy")
    directory.mkdir(parents=True, exist_ok=True)
    document = config_document(checkpoint.config)
    (directory / "config.json").write_text(json.dumps(document, indent=2))
    for file in _TOKENIZER_FILES:
        shutil.copy(tokenizer / file, directory / file)
    padded = padded_tokenizer(tokenizer / "tokenizer.json", checkpoint.config.vocab_size)
    (directory / "tokenizer.json").write_text(json.dumps(padded))
    tensors = vision_tensors(document)
    for tensor in checkpoint.names:
        data = torch.from_numpy(checkpoint.read(tensor)).bfloat16()
        is_head = tensor.startswith("lm_head")
        tensors[tensor if is_head else f"model.language_model.{tensor}"] = data
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def padded_tokenizer(path: Path, vocab_size: int) -> dict[str, Any]:
    """Return a tokenizer with a text for each row of the embedding."""
    document = json.loads(path.read_text())
    vocab = document["model"]["vocab"]
    first = 1 + max(*vocab.values(), *(added["id"] for added in document["added_tokens"]))
    vocab.update((f"[{number}]", number) for number in range(first, vocab_size))
    return document


def config_document(config: ModelConfig) -> dict[str, Any]:
    """Return the multimodal `config.json`."""
    kind = config.model_type
    text = hf_text_config(config) | {"model_type": f"{kind}_text", "dtype": "bfloat16"}
    text["eos_token_id"] = config.eos_token_ids[0]
    text["hidden_act"] = "silu"
    vision = _VISION | {"model_type": kind, "out_hidden_size": config.hidden_size}
    prefix = "Qwen3_5Moe" if config.is_moe else "Qwen3_5"
    return {
        "architectures": [f"{prefix}ForConditionalGeneration"],
        "model_type": kind,
        "dtype": "bfloat16",
        "tie_word_embeddings": config.tie_word_embeddings,
        "text_config": text,
        "vision_config": vision,
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
    }


def vision_tensors(document: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the vision tower's tensors: it is never run, but the model class must load."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config: Any = AutoConfig.for_model(**document)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {
        name: torch.zeros(shape, dtype=torch.bfloat16)
        for name, shape in shapes.items()
        if ".visual." in name
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="a family name")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory to copy it from")
    options = parser.parse_args()
    write_checkpoint(options.name, options.directory, options.tokenizer)


if __name__ == "__main__":
    main()
