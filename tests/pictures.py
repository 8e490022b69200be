"""Tiny vision towers with random weights, random pictures, and what eager PyTorch makes of them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from q35c.compile import compile_model, import_tower
from q35c.frontend.trace_vision import PIXEL_SCALE, hf_vision_config, vision_module
from q35c.ir.graph import Graph
from q35c.ir.text import parse_graph, print_graph
from q35c.runtime.grid import grid_inputs
from q35c.vision_config import VisionConfig
from tests.compiled import graph_of, once
from tests.conftest import COMPILED
from tests.models import edit_json, save_shards, write_checkpoint

TOKENS = {
    "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303,
}  # fmt: skip
_SIZES: dict[str, dict[str, int]] = {
    "plain": {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 112},
    # Heads of 72 dims, and a feed-forward width that no group divides: those of the largest towers.
    "odd": {"depth": 1, "hidden_size": 144, "num_heads": 2, "intermediate_size": 272},
}
# Those of the family, but for their depth and the text's width: 0.8B, 2B and 4B, all others.
_REAL = {"out_hidden_size": 64, "patch_size": 16, "num_position_embeddings": 2304, "depth": 2}
_SIZES |= {
    f"real-{size}": {**_REAL, "hidden_size": size, "num_heads": heads, "intermediate_size": inner}
    for size, heads, inner in ((768, 12, 3072), (1024, 16, 4096), (1152, 16, 4304))
}
GRIDS = ((2, 2), (4, 6), (10, 2), (6, 14))  # rows and columns of patches


def tower_config(kind: str = "plain", **overrides: int) -> VisionConfig:
    common = {
        "out_hidden_size": 48, "patch_size": 4, "temporal_patch_size": 2, "num_position_embeddings": 36,
    }  # fmt: skip
    return VisionConfig.from_dict({**common, **_SIZES[kind], **TOKENS, **overrides})


@functools.cache
def tower_graph(config: VisionConfig) -> Graph:
    """Return the imported trace of a configuration: one worker traces, all read the text."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()
    path = Path(os.environ[COMPILED]) / f"tower-{digest[:12]}.txt"
    once(path, lambda: path.write_text(print_graph(import_tower(config))))
    return parse_graph(path.read_text())


@functools.cache
def eager_tower(config: VisionConfig, seed: int = 0) -> Any:
    """Return transformers' tower in f32, with weights that keep activations near one."""
    model = vision_module().Qwen3_5VisionModel(hf_vision_config(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                drawn /= parameter[0].numel() ** 0.5 if "pos_embed" not in name else 1.0
            else:
                drawn = 0.2 * drawn + ("norm" in name and name.endswith("weight"))
            parameter.copy_(drawn)
    return model


def tower_weights(config: VisionConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the eager tower's weights by canonical name."""
    named = eager_tower(config, seed).named_parameters()
    weights = {f"visual.{name}": tensor.detach().numpy() for name, tensor in named}
    return {n: w.reshape(len(w), -1) if w.ndim > 2 else w for n, w in weights.items()}


def random_patches(config: VisionConfig, grid: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return patches u8 [N, patch_bytes]; a picture's are twice the same frame, a clip's are not."""
    shape = (grid[0] * grid[1], config.patch_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def picture_inputs(
    config: VisionConfig, grid: tuple[int, int], seed: int = 0
) -> dict[str, np.ndarray]:
    """Return what the graph reads for a random picture."""
    beside = grid_inputs(*grid, config.table_side)
    named = {name: getattr(beside, name) for name in ("taps", "tap_weights", "places")}
    return {"patches": random_patches(config, grid, seed), **named}


def eager_rows(
    config: VisionConfig, grid: tuple[int, int], patches: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Return what transformers' eager tower makes of a picture: f32 [merged tokens, out]."""
    pixels = torch.as_tensor(patches).float() * PIXEL_SCALE - 1
    with torch.no_grad():
        made = eager_tower(config, seed)(pixels, grid_thw=torch.tensor([[1, *grid]]))
    return made.pooler_output.numpy()


# --- whole checkpoints ----------------------------------------------------------------------------

PREPROCESSOR = {
    "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "size": {"shortest_edge": 64, "longest_edge": 1 << 20},
}  # fmt: skip
TEXT = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "full_attention_interval": None}


def vision_document(config: VisionConfig) -> dict[str, Any]:
    """Return the `vision_config` of a config.json."""
    sizes = {name: size for name, size in config.to_dict().items() if "token" not in name}
    return {"model_type": "qwen3_5", **sizes, "in_channels": 3, "spatial_merge_size": 2}


def write_seeing_checkpoint(
    path: Path, config: VisionConfig, seed: int = 0, dtype: torch.dtype = torch.float32, **text: Any
) -> Path:
    """Write a multimodal checkpoint whose tower has the weights of `eager_tower`."""
    write_checkpoint(path, seed=seed, dtype=dtype, layout="multimodal", **{**TEXT, "hidden_size": config.out_hidden_size, **text})  # fmt: skip
    tensors = load_file(path / "model.safetensors")
    del tensors["model.visual.patch_embed.proj.weight"]
    for name, parameter in eager_tower(config, seed).named_parameters():
        tensors[f"model.visual.{name}"] = parameter.detach().to(dtype).contiguous()
    save_shards(path, tensors, 1)
    edit_json(path / "config.json", vision_config=vision_document(config), **TOKENS)
    settings = PREPROCESSOR | {"patch_size": config.patch_size}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


@functools.cache
def seeing_artifact(
    kind: str,
    precision: str,
    target: str = "cpu",
    *,
    is_seeing: bool | None = None,
    tokens: int = 64,
) -> Path:
    """Return a tiny multimodal model, compiled once per run; the tower has the precision, the text is f32."""
    folder = Path(os.environ[COMPILED])
    source = folder / f"seeing-{kind}"
    once(source, lambda: write_seeing_checkpoint(source, tower_config(kind)))
    name = f"seeing-{kind}-{precision}-{target.replace(':', '-')}-{is_seeing}-{tokens}.q35c"
    options: dict[str, Any] = {
        "precision": "f32", "vision_precision": precision, "target": target, "vision": is_seeing, "context": 128,
        "batch": 1, "max_image_tokens": tokens, "import_graph": graph_of,
    }  # fmt: skip
    return once(folder / name, lambda: compile_model(source, folder / name, **options))
