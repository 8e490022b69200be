"""R13 at length: 32,768 tokens by decode steps and by prefill chunks end in the same state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.compile import compile_model
from tests.compiled import graph_of, random_ids
from tests.models import write_checkpoint

TOKENS, CHUNK = 32_768, 1000
CHECKED = (1000, 4000, 16_000, 32_000, TOKENS)  # tokens after which both are compared
TOLERANCE = 1e-4  # of the logits' range
# One small attention layer between two of the recurrent kind: its cost grows with the square.
SHAPE = {
    "num_hidden_layers": 3,
    "full_attention_interval": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 40_960,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> q35c.Model:
    folder = tmp_path_factory.mktemp("long")
    source = write_checkpoint(folder / "checkpoint", "dense", 0, **SHAPE)
    compile_model(
        source,
        folder / "long.q35c",
        precision="f32",
        context=TOKENS,
        batch=1,
        import_graph=graph_of,
    )
    return q35c.load(Path(folder / "long.q35c"), threads=1)


def test_steps_and_chunks_do_not_drift_apart(model: q35c.Model) -> None:
    ids = random_ids(TOKENS, seed=1)
    with model.session() as chunks, model.session() as steps:
        done = 0
        for mark in CHECKED:
            for first in range(done, mark, CHUNK):
                want = chunks.prefill(ids[first : min(first + CHUNK, mark)])
            for token in ids[done:mark].tolist():
                got = steps.decode(token)
            done = mark
            difference = np.abs(got - want).max() / (want.max() - want.min())
            assert difference <= TOLERANCE, f"{difference:.1e} of the range after {mark} tokens"
