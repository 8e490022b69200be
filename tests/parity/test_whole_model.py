"""Compiled tower and text together against transformers, which opens the same directory as a whole model."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

import q35c
from q35c.compile import compile_model
from q35c.frontend.trace_vision import PIXEL_SCALE
from q35c.runtime.multimodal import MultimodalPrompt, Picture
from q35c.verify import row_kl
from tests.compiled import CONTEXT, graph_of, once
from tests.conftest import COMPILED
from tests.pictures import TOKENS, random_patches, tower_config, write_seeing_checkpoint

CONFIG = tower_config("plain", out_hidden_size=64)
PADS = {"image": TOKENS["image_token_id"], "video": TOKENS["video_token_id"]}
# Kind of medium, grids of its pictures or pairs of frames.
IMAGES, CLIP = ((6, 10), (2, 8)), ((4, 6), (4, 6))


@functools.cache
def directory(kind: str) -> Path:
    """Return a tiny multimodal checkpoint with a random tower; the text has both kinds of layer."""
    path = Path(os.environ[COMPILED]) / f"whole-{kind}"
    text: dict[str, Any] = {
        "num_hidden_layers": 3,
        "layer_types": None,
        "full_attention_interval": 2,
    }
    return once(path, lambda: write_seeing_checkpoint(path, CONFIG, kind=kind, **text))


@functools.cache
def compiled(kind: str, precision: str) -> q35c.Model:
    output = directory(kind).with_suffix(f".{precision}.q35c")
    options: dict[str, Any] = {"precision": precision, "context": CONTEXT, "max_image_tokens": 64}
    once(output, lambda: compile_model(directory(kind), output, import_graph=graph_of, **options))
    return q35c.load(output)


@functools.cache
def reference(kind: str) -> tuple[np.ndarray, list[Any]]:
    """Return transformers' logits of a prompt with two images and a clip, and the prompt's parts as q35c takes them."""
    model = AutoModelForImageTextToText.from_pretrained(
        directory(kind), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    parts: list[Any] = [[5, 6, 7]]
    for medium, grids in (("image", IMAGES), ("video", CLIP)):
        for number, grid in enumerate(grids):
            parts += [(medium, grid, random_patches(CONFIG, grid, number)), [8, 9, 10]]
    ids: list[int] = []
    kinds: list[int] = []
    for part in parts:
        is_text = isinstance(part, list)
        count = len(part) if is_text else part[1][0] * part[1][1] // 4
        ids += part if is_text else [PADS[part[0]]] * count
        kinds += [0 if is_text else 1 + (part[0] == "video")] * count

    def pixels(medium: str) -> torch.Tensor:
        found = [torch.from_numpy(p[2]) for p in parts if isinstance(p, tuple) and p[0] == medium]
        return torch.cat(found).float() * PIXEL_SCALE - 1

    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([ids]),
            mm_token_type_ids=torch.tensor([kinds]),
            pixel_values=pixels("image"),
            image_grid_thw=torch.tensor([[1, *grid] for grid in IMAGES]),
            pixel_values_videos=pixels("video"),
            video_grid_thw=torch.tensor([[len(CLIP), *CLIP[0]]]),
            use_cache=False,
        ).logits[0]
    return logits.numpy(), parts


def seen(model: q35c.Model, parts: list[Any]) -> MultimodalPrompt:
    """Return a prompt whose pictures were seen by the model's own tower."""
    return MultimodalPrompt.join(
        [
            part
            if isinstance(part, list)
            else Picture(model.see(part[2], part[1]), part[1][0] // 2, part[1][1] // 2)
            for part in parts
        ]
    )


@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=pytest.mark.slow)])
def test_text_images_and_a_clip_equal_the_whole_model(kind: str) -> None:
    want, parts = reference(kind)
    model = compiled(kind, "f32")
    prompt = seen(model, parts)
    got = model.score(prompt)
    assert np.abs(got - want).max() <= 1e-4 * np.ptp(want)
    with model.session() as session:
        for cut in (4, 10, 25, len(prompt) - 2):
            session.reset()
            session.extend(prompt[:cut])
            logits = session.prefill(prompt[cut:-1])
            assert np.abs(logits - want[-2]).max() <= 1e-4 * np.ptp(want), cut
            assert np.abs(session.decode(10) - want[-1]).max() <= 1e-4 * np.ptp(want)


@pytest.mark.slow
def test_in_bf16_they_stay_close() -> None:
    """Dense: of random experts a rounded row now and then takes others."""
    want, parts = reference("dense")
    model = compiled("dense", "bf16")
    got = model.score(seen(model, parts))
    assert row_kl(got, want).mean() <= 1e-3
