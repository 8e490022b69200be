"""transformers' eager model in bfloat16 as an engine of the worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class EagerEngine:
    """The text tower of a checkpoint, as `transformers` runs it."""

    def __init__(self, directory: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        self._model.eval()
        self.vocabulary: int = self._model.config.get_text_config().vocab_size
        self._cache: Any = None

    def reset(self) -> None:
        self._cache = None

    @torch.no_grad()
    def prefill(self, ids: Sequence[int]) -> None:
        tokens = torch.tensor([list(ids)])
        # the head runs for the last token only, as in every other system
        made = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = made.past_key_values

    def decode(self, token: int) -> None:
        self.prefill([token])

    def facts(self) -> dict[str, Any]:
        return {}


def load(model: str, threads: int, context: int) -> EagerEngine:
    del context  # the cache grows
    return EagerEngine(model, threads)
