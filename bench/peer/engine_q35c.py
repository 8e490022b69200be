"""q35c as an engine of the worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import q35c


class Q35cEngine:
    """A compiled artifact."""

    def __init__(self, artifact: str, threads: int, context: int) -> None:
        self._model: Any = q35c.load(artifact, threads)
        self.vocabulary: int = self._model.vocab_size
        self._context = context
        self._session: Any = None

    def reset(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = self._model.session(context=self._context)

    def prefill(self, ids: Sequence[int]) -> None:
        self._session.prefill(ids)

    def decode(self, token: int) -> None:
        self._session.decode(token)

    def facts(self) -> dict[str, Any]:
        manifest = self._model.manifest
        return {"target": manifest.target.name, "precision": manifest.precision}


def load(model: str, threads: int, context: int) -> Q35cEngine:
    return Q35cEngine(model, threads, context)
