"""Prompts of text, images and clips for a tiny multimodal model, and what transformers makes of them."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeForConditionalGeneration,
)

from q35c.frontend.checkpoint import open_checkpoint
from q35c.runtime.multimodal import MultimodalPrompt, Picture
from tests.compiled import checkpoint

IMAGE, VIDEO, START, END = 303, 304, 305, 306
PIXELS = 3 * 2 * 16 * 16
CLASSES: dict[str, tuple[type, type]] = {
    "dense": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "moe": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
}


@dataclass(frozen=True)
class Image:
    """An image of so many patches, of random pixels."""

    height: int
    width: int
    seed: int = 0


@dataclass(frozen=True)
class Frames(Image):
    """A pair of frames of a clip. All of a prompt's pairs in a row with one size are one clip; text stands between them."""


Part = tuple[int, ...] | Image


@functools.cache
def multimodal_oracle(kind: str) -> Any:
    """Return transformers' whole model on the checkpoint's text weights and a random tower."""
    place = checkpoint(kind)
    config_class, model_class = CLASSES[kind]
    text = json.loads((place / "config.json").read_text())
    vision = {
        "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 36,
    }  # fmt: skip
    config = config_class(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    model.set_experts_implementation("eager") if kind == "moe" else None
    opened = open_checkpoint(place)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".visual." in name:
                parameter.normal_(std=0.2)
            else:
                canonical = name.removeprefix("model.language_model.")
                parameter.copy_(torch.from_numpy(opened.read(canonical)))
    return model


@functools.cache
def pixels_of(part: Image) -> torch.Tensor:
    generator = torch.Generator().manual_seed(part.seed)
    return torch.randn(part.height * part.width, PIXELS, generator=generator)


@functools.cache
def picture_of(kind: str, part: Image) -> Picture:
    """Return the tower's rows of an image or of a pair of frames: the tower sees one at a time."""
    grid = torch.tensor([[1, part.height, part.width]])
    with torch.no_grad():
        rows = multimodal_oracle(kind).model.visual(pixels_of(part), grid_thw=grid).pooler_output
    return Picture(rows.numpy(), part.height // 2, part.width // 2)


def prompt_of(kind: str, *parts: Part) -> MultimodalPrompt:
    """Return what q35c is given."""
    return MultimodalPrompt.join(
        [picture_of(kind, part) if isinstance(part, Image) else part for part in parts]
    )


def media_of(parts: tuple[Part, ...], pad: int, kind: type) -> dict[str, Any]:
    """Return transformers' arguments for images, or for clips: pairs of frames of equal size are one clip."""
    found = [part for part in parts if type(part) is kind]
    names = {
        IMAGE: ("pixel_values", "image_grid_thw"),
        VIDEO: ("pixel_values_videos", "video_grid_thw"),
    }[pad]
    if not found:
        return {}
    is_clip = kind is Frames
    groups = itertools.groupby(found, lambda part: (part.height, part.width) if is_clip else part)
    grids = [
        [len(of) if is_clip else 1, of[0].height, of[0].width]
        for of in (list(g) for _, g in groups)
    ]
    return {names[0]: torch.cat([pixels_of(part) for part in found]), names[1]: torch.tensor(grids)}


def oracle_inputs(*parts: Part) -> dict[str, Any]:
    """Return what transformers is given: pads in the ids, pixels and grids beside them."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, Image):
            pad = VIDEO if isinstance(part, Frames) else IMAGE
            ids += [pad] * (part.height * part.width // 4)
        else:
            ids += part
    kinds = [1 if token == IMAGE else 2 if token == VIDEO else 0 for token in ids]
    media = media_of(parts, IMAGE, Image) | media_of(parts, VIDEO, Frames)
    return {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([kinds]), **media}


@functools.cache
def oracle_logits(kind: str, *parts: Part) -> np.ndarray:
    """Return the logits f32[cells, V] of the whole multimodal model."""
    model = multimodal_oracle(kind)
    model.model.rope_deltas = None  # it outlives a call
    with torch.no_grad():
        return model(**oracle_inputs(*parts), use_cache=False).logits[0].numpy()


def oracle_positions(*parts: Part) -> tuple[np.ndarray, int]:
    """Return transformers' positions [3, cells] and the next one."""
    inputs = oracle_inputs(*parts)
    positions, delta = multimodal_oracle("dense").model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"],
        inputs.get("image_grid_thw"), inputs.get("video_grid_thw"),
    )  # fmt: skip
    return positions[:, 0].numpy(), int(delta) + positions.shape[-1]
