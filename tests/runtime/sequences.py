"""Token sequences for the fake model, and what it computes of one in a single call."""

from __future__ import annotations

import numpy as np

import q35c
from tests.fake_artifact import VOCAB

FAILING = 99  # the code reports a failure where a test asks for it


def random_ids(count: int, seed: int = 0) -> list[int]:
    """Return tokens without the failing one."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, count)
    return np.where(ids == FAILING, 0, ids).tolist()


def one_shot(model: q35c.Model, ids: list[int]) -> np.ndarray:
    """Return the logits of the last token."""
    with model.session() as session:
        return session.prefill(ids)
