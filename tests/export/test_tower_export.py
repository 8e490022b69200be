"""The vision tower as an ONNX model: against eager PyTorch, whatever the grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from q35c.errors import OptionError
from q35c.export.onnx import export_checkpoint
from tests.compiled import checkpoint
from tests.pictures import (
    GRIDS,
    eager_rows,
    picture_inputs,
    tower_config,
    write_seeing_checkpoint,
)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    folder = tmp_path_factory.mktemp("tower")
    source = write_seeing_checkpoint(folder / "model", tower_config("odd"))
    path = export_checkpoint(source, folder / "tower.onnx", part="vision")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


@pytest.mark.parametrize("grid", GRIDS)
def test_embeddings_equal_eager_pytorch(session, grid: tuple[int, int]) -> None:
    inputs = picture_inputs(tower_config("odd"), grid)
    (rows,) = session.run(None, inputs)
    want = eager_rows(tower_config("odd"), grid, inputs["patches"])
    np.testing.assert_allclose(rows, want, rtol=0, atol=1e-5 * np.ptp(want))


def test_names_and_dims_are_readable(session) -> None:
    assert [(item.name, item.shape) for item in session.get_inputs()] == [
        ("patches", ["4*T", 96]), ("taps", ["4*T", 4]), ("tap_weights", ["4*T", 4]), ("places", ["4*T", 2]),
    ]  # fmt: skip
    assert [(item.name, item.shape) for item in session.get_outputs()] == [
        ("embeddings", ["T", 48])
    ]


def test_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no vision tower"):
        export_checkpoint(checkpoint("dense"), tmp_path / "m.onnx", part="vision")
    with pytest.raises(OptionError, match="part"):
        export_checkpoint(checkpoint("dense"), tmp_path / "m.onnx", part="audio")
