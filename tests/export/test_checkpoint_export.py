"""From a checkpoint to ONNX and back to logits: against eager PyTorch, the interpreter, the artifact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest

from q35c.errors import CheckpointError, OptionError
from q35c.export.onnx import export_checkpoint
from q35c.frontend.checkpoint import open_checkpoint
from q35c.ir import Graph
from q35c.ir.interpret import run
from q35c.passes import pipeline
from tests.compiled import checkpoint, model, oracle
from tests.models import eager_model_logits

TOKENS = 37


@dataclass(frozen=True)
class Exported:
    """An export in onnxruntime, and the fused graph that it was made from."""

    kind: str
    graph: Graph
    session: onnxruntime.InferenceSession


@pytest.fixture(scope="module", params=["dense", "moe"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    kind = request.param
    output = tmp_path_factory.mktemp("onnx") / f"{kind}.onnx"
    stages: list[tuple[str, float]] = []
    graphs: list[Graph] = []
    fuse = pipeline.fuse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "fuse", lambda graph: graphs.append(fuse(graph)) or graphs[-1])
        path = export_checkpoint(checkpoint(kind), output, progress=lambda *s: stages.append(s))
    assert path == output and stages[0] == ("trace", 0.0) and stages[-1] == ("write weights", 1.0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return Exported(kind, graphs[0], onnxruntime.InferenceSession(str(path), options))


def inputs(tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random ids and the positions of text."""
    ids = np.random.default_rng(seed).integers(0, 307, tokens).astype(np.int32)
    return {"tokens": ids, "positions": np.tile(np.arange(tokens, dtype=np.int32), (3, 1))}


@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_logits_equal_eager_pytorch(exported: Exported, tokens: int):
    feed = inputs(tokens, seed=tokens)
    (logits,) = exported.session.run(None, feed)
    expected = eager_model_logits(oracle(exported.kind), feed["tokens"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.ptp(expected))


def test_the_three_position_axes_are_kept_apart(exported: Exported):
    feed = inputs(TOKENS)
    feed["positions"] = np.random.default_rng(1).integers(0, 99, (3, TOKENS)).astype(np.int32)
    (logits,) = exported.session.run(None, feed)
    expected = eager_model_logits(oracle(exported.kind), feed["tokens"], feed["positions"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.ptp(expected))


def test_logits_equal_the_interpreted_graph(exported: Exported):
    feed = inputs(TOKENS)
    read = open_checkpoint(checkpoint(exported.kind)).read
    (expected,) = run(exported.graph, feed, read)
    (logits,) = exported.session.run(None, feed)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.ptp(expected))


def test_logits_equal_the_compiled_artifact(exported: Exported):
    feed = inputs(TOKENS)
    (logits,) = exported.session.run(None, feed)
    scored = model(exported.kind).score(feed["tokens"])
    np.testing.assert_allclose(scored, logits, rtol=0, atol=1e-3 * np.ptp(logits))


def test_bad_arguments_are_refused_before_any_work(tmp_path):
    with pytest.raises(OptionError, match="no such directory"):
        export_checkpoint(tmp_path, tmp_path / "missing" / "m.onnx")
    with pytest.raises(CheckpointError):
        export_checkpoint(tmp_path / "nothing", tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
