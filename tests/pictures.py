"""Tiny vision towers with random weights, random pictures, and what eager PyTorch makes of them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from q35c.frontend.importer import import_program
from q35c.frontend.trace_vision import PIXEL_SCALE, hf_vision_config, trace_tower, vision_module
from q35c.ir.graph import Graph
from q35c.runtime.grid import grid_inputs
from q35c.vision_config import VisionConfig

TOKENS = {
    "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303,
}  # fmt: skip
_SIZES: dict[str, dict[str, int]] = {
    "plain": {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 112},
    # Heads of 72 dims, and a feed-forward width that no group divides: those of the largest towers.
    "odd": {"depth": 1, "hidden_size": 144, "num_heads": 2, "intermediate_size": 272},
}
GRIDS = ((2, 2), (4, 6), (10, 2), (6, 14))  # rows and columns of patches


def tower_config(kind: str = "plain", **overrides: int) -> VisionConfig:
    common = {
        "out_hidden_size": 48, "patch_size": 4, "temporal_patch_size": 2, "num_position_embeddings": 36,
    }  # fmt: skip
    return VisionConfig.from_dict({**common, **_SIZES[kind], **TOKENS, **overrides})


@functools.cache
def tower_graph(config: VisionConfig) -> Graph:
    return import_program(trace_tower(config), "vision", "visual.")


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
