"""onnxruntime-genai as an engine of the worker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime_genai as og


class OrtEngine:
    """A model that onnxruntime-genai's builder made."""

    def __init__(self, directory: str, threads: int, context: int) -> None:
        document = json.loads((Path(directory) / "genai_config.json").read_text())
        self.vocabulary: int = document["model"]["vocab_size"]
        config: Any = og.Config(directory)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model: Any = og.Model(config)
        self._context = context
        self._generator: Any = None

    def reset(self) -> None:
        self._generator = None  # its caches go before the next ones come
        parameters: Any = og.GeneratorParams(self._model)
        # the caches are allocated at this length
        parameters.set_search_options(max_length=self._context, min_length=self._context)
        self._generator = og.Generator(self._model, parameters)

    def prefill(self, ids: Sequence[int]) -> None:
        self._generator.append_tokens(list(ids))

    def decode(self, token: int) -> None:
        self._generator.append_tokens([token])

    def facts(self) -> dict[str, Any]:
        return {}


def load(model: str, threads: int, context: int) -> OrtEngine:
    return OrtEngine(model, threads, context)
