"""Trace Hugging Face's own vision tower on the meta device, without weights, for one picture or pair of frames.

What the tower derives from the grid of patches (taps into the position table, rotary positions) becomes input: it is
computed in loops over pictures that cannot be traced. Attention over the whole picture becomes one opaque op.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from q35c.vision_config import CHANNELS, MERGE, VisionConfig

# Where "flash" is in the name, the tower hands over whole tensors instead of splitting them by numbers in a tensor.
IMPLEMENTATION = "q35c_flash"
PIXEL_SCALE = 1 / 127.5  # of a byte to -1..1
_EXAMPLE_TOKENS = 24
_MAX_TOKENS = 1 << 16
_lock = threading.Lock()


@torch.library.custom_op("q35c::full_attention", mutates_args=())
def full_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Stand for attention without a mask of [1, H, T, D] tensors; the result is [1, T, H, D]."""
    raise NotImplementedError("only traced")


full_attention.register_fake(
    lambda query, key, value, scale: torch.empty_like(query.transpose(1, 2))
)


def trace_tower(config: VisionConfig) -> ExportedProgram:
    """Export the tower for a picture of M tokens: rows f32 [M, out], as the text model reads them.

    Inputs: patches u8 [4 M, patch_bytes], taps i64 [4 M, 4] into the position table and their weights f32 [4 M, 4], places
    i64 [4 M, 2], the row and column of each patch. Parameters are on the meta device; M is symbolic.
    """
    with _lock, _registered(), torch.no_grad():
        tower = _Tower(_meta_tower(config)).eval()
        patches = MERGE**2 * _EXAMPLE_TOKENS
        shapes = {
            "patches": ((patches, config.patch_bytes), torch.uint8),
            "taps": ((patches, 4), torch.long),
            "tap_weights": ((patches, 4), torch.float32),
            "places": ((patches, 2), torch.long),
        }
        made = {
            name: torch.zeros(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in shapes.items()
        }
        merged = Dim("M", min=1, max=_MAX_TOKENS)
        dynamic = {name: {0: MERGE**2 * merged} for name in made}
        return torch.export.export(tower, (), made, dynamic_shapes=dynamic, strict=False)


def vision_module() -> ModuleType:
    """Return transformers' module that defines the tower; dense and sparse models have the same."""
    return importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5")


def hf_vision_config(config: VisionConfig) -> Any:
    """Return transformers' vision config object for a checked configuration, with eager attention."""
    module = importlib.import_module("transformers.models.qwen3_5.configuration_qwen3_5")
    sizes = {name: size for name, size in config.to_dict().items() if "token" not in name}
    made = module.Qwen3_5VisionConfig(**sizes, in_channels=CHANNELS, spatial_merge_size=MERGE)
    made._attn_implementation = "eager"
    return made


class _Tower(torch.nn.Module):
    """Give the tower the signature that is traced."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor, taps: Tensor, tap_weights: Tensor, places: Tensor) -> Tensor:
        pixels = patches.float() * PIXEL_SCALE + -1.0
        unread = torch.zeros(2, dtype=torch.int32, device=patches.device)
        return self.model(
            pixels, grid_thw=None, interp_indices=taps, interp_weights=tap_weights,
            position_ids=places, cu_seqlens=unread, max_seqlen=1,
        ).pooler_output  # fmt: skip


def _meta_tower(config: VisionConfig) -> torch.nn.Module:
    """Build the tower in float32 without memory; only its rotary frequencies are real."""
    module, settings = vision_module(), hf_vision_config(config)
    with torch.device("meta"):
        model = module.Qwen3_5VisionModel(settings).float()
    # Behind the check, which would look for a kernel of this name to download.
    settings._attn_implementation_internal = IMPLEMENTATION
    rotary = module.Qwen3_5VisionRotaryEmbedding(settings)
    model.rotary_pos_emb.inv_freq = torch.nn.Buffer(rotary.inv_freq, persistent=False)
    with torch.device("meta"):
        model.patch_embed = _PatchEmbed(config)
    return model


class _PatchEmbed(torch.nn.Module):
    """Stand for the convolution, whose kernel is as large as its input, by the linear that it is."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(config.patch_bytes, config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


@contextmanager
def _registered() -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = _attention_function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]


def _attention_function(module, query, key, value, attention_mask=None, scaling=None, **options):
    if attention_mask is not None or options.get("is_causal") is not False:
        raise NotImplementedError("attention of a picture with a mask")
    return full_attention(query, key, value, scaling), None
