"""From a checkpoint to ONNX and back to logits: against eager PyTorch, the interpreter, the artifact."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from q35c.errors import CheckpointError, OptionError
from q35c.export.onnx import export_checkpoint
from q35c.frontend.checkpoint import open_checkpoint
from q35c.frontend.importer import import_program
from q35c.frontend.trace import trace_model
from q35c.ir.interpret import run
from tests.compiled import artifact, checkpoint, model, oracle
from tests.models import eager_model_logits

# Grouped queries, 2 value heads per key head, tied and untied heads.
MODELS = {"dense": {"tie_word_embeddings": True}, "moe": {}}
TOKENS = 37


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The kind, its overrides and an onnxruntime session on its export."""
    kind, overrides = request.param, MODELS[request.param]
    output = tmp_path_factory.mktemp("onnx") / f"{kind}.onnx"
    stages: list[tuple[str, float]] = []
    path = export_checkpoint(checkpoint(kind, **overrides), output, progress=lambda *s: stages.append(s))
    assert path == output and stages[0] == ("trace", 0.0) and stages[-1] == ("write weights", 1.0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return kind, overrides, onnxruntime.InferenceSession(str(path), options)


def inputs(tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random ids and the positions of text."""
    ids = np.random.default_rng(seed).integers(0, 307, tokens).astype(np.int32)
    return {"tokens": ids, "positions": np.tile(np.arange(tokens, dtype=np.int32), (3, 1))}


@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_logits_equal_eager_pytorch(exported, tokens: int):
    kind, overrides, session = exported
    feed = inputs(tokens, seed=tokens)
    (logits,) = session.run(None, feed)
    expected = eager_model_logits(oracle(kind, **overrides), feed["tokens"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.ptp(expected))


def test_the_three_position_axes_are_kept_apart(exported):
    kind, overrides, session = exported
    feed = inputs(TOKENS)
    feed["positions"] = np.random.default_rng(1).integers(0, 99, (3, TOKENS)).astype(np.int32)
    (logits,) = session.run(None, feed)
    expected = eager_model_logits(oracle(kind, **overrides), feed["tokens"], feed["positions"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.ptp(expected))


def test_logits_equal_the_interpreted_trace(exported):
    kind, overrides, session = exported
    source = open_checkpoint(checkpoint(kind, **overrides))
    feed = inputs(TOKENS)
    (expected,) = run(import_program(trace_model(source.config)), feed, source.read)
    (logits,) = session.run(None, feed)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.ptp(expected))


def test_logits_equal_the_compiled_artifact(exported):
    kind, overrides, session = exported
    assert artifact(kind, **overrides).exists()
    feed = inputs(TOKENS)
    (logits,) = session.run(None, feed)
    scored = model(kind, **overrides).score(feed["tokens"])
    np.testing.assert_allclose(scored, logits, rtol=0, atol=1e-3 * np.ptp(logits))


def test_bad_arguments_are_refused_before_any_work(tmp_path):
    with pytest.raises(OptionError, match="no such directory"):
        export_checkpoint(tmp_path, tmp_path / "missing" / "m.onnx")
    with pytest.raises(CheckpointError):
        export_checkpoint(tmp_path / "nothing", tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
