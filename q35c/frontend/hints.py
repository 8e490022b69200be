"""Say what a checkpoint probably is whose tensors do not fit."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection

_COMPARED_NAMES = 1000  # of a file that may hold hundreds of thousands
_OTHER_MODEL = "the file belongs to another model, or config.json describes another one"
_ADAPTER = "the weights are an adapter's: merge it into its base model first"


def missing_hint(name: str, unused: Collection[str]) -> str | None:
    """Return what may be there in a missing tensor's place, `unused` being the tensors that nothing asked for yet."""
    if any(".lora_" in other or other.startswith("base_model.") for other in _some(unused)):
        return _ADAPTER
    if name == "lm_head.weight":
        return "if the head shares the embedding, set tie_word_embeddings to true in config.json"
    near = difflib.get_close_matches(name[:200], [other[:200] for other in _some(unused)])
    return f"the names nearest to it are {', '.join(near)}" if near else None


def shape_hint(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> str | None:
    """Return why a tensor may have another shape than its model's."""
    if name.endswith("conv1d.weight") and got == (expected[0], expected[2], expected[1]):
        return "an MLX conversion, which stores other values, too; use the original of it"
    if name in ("embed_tokens.weight", "lm_head.weight") and got[1:] == expected[1:]:
        return "vocab_size in config.json is not the number of rows that is stored"
    return None


def unexpected_hint(name: str) -> str:
    """Return what a tensor may belong to that a model does not have."""
    if ".lora_" in name or name.startswith("base_model."):
        return _ADAPTER
    if name.startswith(("score.", "classifier.", "v_head.", "value_head.", "reward_head.")):
        return "a classifier or a model of rewards, not one of language"
    if (
        name.endswith(("scales", "biases", "qweight", "qzeros", "weight_packed"))
        or "weight_scale" in name
    ):
        return "the weights are quantized; use the bf16, f16 or f32 original"
    return _OTHER_MODEL


def _some(names: Collection[str]) -> list[str]:
    return list(itertools.islice(names, _COMPARED_NAMES))
