"""Whole models on the emulated device: every kernel checked, parity with eager PyTorch, and what the runtime promises."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import q35c
from tests.compiled import model as cpu_model
from tests.compiled import oracle_logits, random_ids
from tests.cuda.compiled import cuda_artifact, load_cuda
from tests.cuda.emulated import Emulated
from tests.cuda.machine import engine
from tests.parity.test_parity import assert_parity

NIGHTLY = pytest.mark.nightly
KINDS = (pytest.param("dense", marks=NIGHTLY), "moe")
PRECISIONS = (
    ("w4", "int8"),
    ("bf16", "auto"),
    ("w8", "auto"),
    ("w4", "auto"),
    ("w4-small", "auto"),
)


@pytest.fixture
def machine() -> Iterator[Emulated]:
    """Return the hands on the emulated driver; nothing may have been found."""
    driver = Emulated(engine())
    driver.recover()
    yield driver
    assert driver.findings() == []


@pytest.mark.parametrize("kind", KINDS)
def test_parity_of_every_entry(
    kind: str, machine: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt, more of it, tokens one by one through the captured graph, and a snapshot."""
    ids = random_ids(12)
    want = oracle_logits(ids, kind)
    with load_cuda(monkeypatch, kind) as model, model.session() as session:
        got = [session.prefill(ids[:5])]
        got += [session.decode(token) for token in ids[5:8]]
        saved = session.snapshot()
        scores = session.score(ids[8:])
        assert_parity(np.stack(got), want[4:8])
        assert_parity(scores, want[8:])
        session.restore(saved)
        np.testing.assert_array_equal(session.decode(ids[8]), session_row(model, ids[:9]))


def session_row(model: q35c.Model, ids: np.ndarray) -> np.ndarray:
    """Return the logits of the last token, given as the test above gives them."""
    with model.session() as session:
        session.prefill(ids[:5])
        return [session.decode(token) for token in ids[5:]][-1]


def test_a_batch_gives_the_bits_of_single_sequences(machine: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    prompts = [random_ids(count, seed=count) for count in (3, 1, 5)]
    with load_cuda(monkeypatch, "moe") as model:
        alone = []
        for ids in prompts:
            with model.session() as session:
                session.prefill(ids)
                alone.append([session.decode(token) for token in (7, 8)])
        sessions = [model.session() for _ in prompts]
        for session, ids in zip(sessions, prompts, strict=True):
            session.prefill(ids)
        for step, token in enumerate((7, 8)):
            rows = q35c.Session.decode_together(sessions, [token] * len(prompts))
            for row, single in zip(rows, alone, strict=True):
                np.testing.assert_array_equal(row, single[step])


@NIGHTLY
@pytest.mark.parametrize(("precision", "kv_dtype"), PRECISIONS)
def test_integers_are_those_of_the_cpu(precision: str, kv_dtype: str, machine: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Weights, levels and rounding are the same: what is left is the order of sums, and rows that it lets round another way."""
    ids = random_ids(6)
    with (
        load_cuda(monkeypatch, "dense", precision, kv_dtype=kv_dtype) as model,
        model.session() as session,
    ):
        got = session.score(ids)
    with cpu_model("dense", precision, kv_dtype=kv_dtype).session() as session:
        want = session.score(ids)
    assert np.abs(got - want).max() <= 0.01 * (want.max() - want.min())


def test_the_artifact_says_what_is_launched(machine: Emulated) -> None:
    from q35c.artifact import read_artifact

    with read_artifact(cuda_artifact("moe")) as artifact:
        artifact.verify_segments()
        manifest = artifact.manifest
        text = artifact.code().decode()
    target = manifest.target
    assert target.backend == "cuda" and [i.architecture for i in target.images] == ["emulated"]
    assert all(f" {kernel.symbol}(" in text for kernel in target.kernels)
    assert all(entry.steps for entry in manifest.entries)
