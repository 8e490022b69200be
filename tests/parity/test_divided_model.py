"""A model whose every kernel is divided as finely as it can be gives the bits of one with equal shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.compile import compile_model
from tests.compiled import BATCH, CONTEXT, artifact, checkpoint, graph_of, random_ids

IDS = random_ids(130, seed=8)


def logits(path: Path, threads: int) -> np.ndarray:
    """Return those of a prompt, of short ones and of some steps behind it."""
    with q35c.load(path, threads=threads) as model, model.session() as session:
        results = [session.prefill(IDS[:100]), session.prefill(IDS[100:103])]
        return np.stack([*results, *(session.decode(int(token)) for token in IDS[103:])])


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_divided_kernels(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("q35c.codegen.cpu.division.PART_BYTES", 1)  # tiny models have tiny kernels
        patch.setattr("q35c.codegen.cpu.division.FEWEST_PARTS", 1)
        divided = tmp_path / "divided.q35c"
        options = {"precision": "w4", "context": CONTEXT, "batch": BATCH}
        compile_model(checkpoint(kind, "w4"), divided, import_graph=graph_of, **options)
    expected = logits(artifact(kind, "w4"), 1)
    assert divided.read_bytes() != artifact(kind, "w4").read_bytes()
    for threads in (1, 2):
        assert np.array_equal(logits(divided, threads), expected)
