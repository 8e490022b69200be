"""A model on an NVIDIA device, where there is one: the same promises as on the emulated device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.compile import compile_model
from q35c.errors import NoDevice, OptionError, ToolchainError
from q35c.runtime.cuda.context import Context
from q35c.verify import verify_artifact
from tests.conftest import COMPILED
from tests.cuda.compiled import DEMO

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def architecture() -> Iterator[str]:
    """Return what the device of this machine is called by `--target`; without a device, skip."""
    try:
        major, minor = Context(0).capability
    except NoDevice as error:
        pytest.skip(f"no NVIDIA device: {error.what}")
    yield f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def compiled(architecture: str, precision: str) -> Path:
    path = Path(os.environ[COMPILED]) / f"demo-{precision}-{architecture}.q35c"
    if not path.exists():
        try:
            compile_model(DEMO, path, target=f"cuda:{architecture}", precision=precision)
        except (OptionError, ToolchainError) as error:
            pytest.skip(f"nothing can be compiled for this device: {error.what}")
    return path


@pytest.mark.parametrize("precision", ["f32", "bf16", "w8", "w4", "w4-small"])
def test_promises_are_kept(architecture: str, precision: str) -> None:
    report = verify_artifact(compiled(architecture, precision), DEMO, device="cuda:0")
    assert report.failures == ()


def test_steps_in_a_batch_and_after_a_snapshot_have_the_same_bits(architecture: str) -> None:
    with q35c.load(compiled(architecture, "w4")) as model:
        sessions = [model.session() for _ in range(3)]
        for number, session in enumerate(sessions):
            session.prefill(range(5, 40 + number))
        saved = [session.snapshot() for session in sessions]
        together = q35c.Session.decode_together(sessions, [7, 8, 9])
        for session, snapshot, token, row in zip(sessions, saved, (7, 8, 9), together, strict=True):
            session.restore(snapshot)
            np.testing.assert_array_equal(session.decode(token), row)
