"""A tiny model that sees, compiled once per run, with a tokenizer and a template that know pictures."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import q35c
from q35c.compile import compile_model
from q35c.runtime.seeing import Eyes
from q35c.vision.files import IMAGE as PICTURES_FILE
from q35c.vision.files import VIDEO as CLIPS_FILE
from q35c.vision.files import read_parameters
from q35c.vision.patches import Frame
from tests.compiled import graph_of, once
from tests.conftest import COMPILED
from tests.models import edit_json
from tests.pictures import tower_config, write_seeing_checkpoint

TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
IMAGE, VIDEO, START, END = 266, 267, 268, 269  # behind those of the tiny tokenizer
IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
TOWER = tower_config("plain", patch_size=16, **IDS)
HIDDEN = TOWER.out_hidden_size
_COMMON = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
PREPROCESSORS: dict[str, dict[str, Any]] = {
    PICTURES_FILE: {**_COMMON, "size": {"shortest_edge": 1024, "longest_edge": 1 << 20}},
    CLIPS_FILE: {**_COMMON, "size": {"shortest_edge": 4096, "longest_edge": 25165824}},
}
PARAMETERS = read_parameters(PREPROCESSORS)
TEMPLATE = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}
{%- if p.type == 'image' or 'image_url' in p %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif p.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CONTEXT = 2048


@functools.cache
def seeing_checkpoint() -> Path:
    """Return the directory of a multimodal checkpoint, as transformers reads it."""
    place = Path(os.environ[COMPILED]) / "chat-sees"

    def make() -> None:
        write_seeing_checkpoint(place, TOWER)
        edit_json(place / "config.json", **IDS)
        tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
        tokenizer.add_special_tokens(list(TOKENS))
        assert [tokenizer.token_to_id(token) for token in TOKENS] == [*IDS.values()]
        tokenizer.save(str(place / "tokenizer.json"))
        (place / "chat_template.jinja").write_text(TEMPLATE)
        for name, document in PREPROCESSORS.items():
            (place / name).write_text(json.dumps(document))

    return once(place, make)


@functools.cache
def seeing_place() -> Path:
    """Return its artifact, in f32."""
    source = seeing_checkpoint()
    options: dict[str, Any] = {
        "precision": "f32",
        "context": CONTEXT,
        "max_image_tokens": 256,
        "batch": 2,
    }
    output = source.with_name("chat-sees.q35c")
    return once(output, lambda: compile_model(source, output, import_graph=graph_of, **options))


@functools.cache
def seeing_model() -> q35c.Model:
    """Return the model; a run's tests share it."""
    return q35c.load(seeing_place())


class Counted:
    """A tower that counts its calls."""

    def __init__(self, see: Callable[[Frame], np.ndarray]) -> None:
        self.calls = 0
        self._see = see

    def __call__(self, frame: Frame) -> np.ndarray:
        self.calls += 1
        return self._see(frame)


def mean_colours(frame: Frame) -> np.ndarray:
    """Return rows that a server without weights can make: each token's mean colour, times a fixed matrix."""
    matrix = np.random.default_rng(0).normal(size=(3, HIDDEN)).astype(np.float32)
    return (
        frame.patches.reshape(-1, 4, 3, 512).mean((1, 3), dtype=np.float32) / 127.5 - 1
    ) @ matrix


def open_eyes(model: q35c.Model, **options: Any) -> Counted:
    """Give a model eyes that have seen nothing yet; return what counts."""
    vision, tower = model.manifest.vision, Counted(model._see)
    assert vision is not None
    model.prompting.eyes = Eyes(vision.config, vision.parameters, tower, **options)
    return tower
