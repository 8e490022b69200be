"""The demo model whole on the emulated device: parity with eager PyTorch, and the same text whatever way leads to it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import q35c
from q35c.runtime.cuda.driver import LIBRARY
from q35c.verify import PARAGRAPH, verify_artifact
from tests.cuda.compiled import DEMO, demo_artifact
from tests.cuda.emulated import Emulated
from tests.cuda.machine import engine

NIGHTLY = pytest.mark.nightly
PRECISIONS = ("f32", *(pytest.param(name, marks=NIGHTLY) for name in ("bf16", "w8", "w4", "w4-small")))  # fmt: skip


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    """Put the emulated driver over the machine in libcuda's place; it must have found nothing, and everything back."""
    driver = Emulated(engine())
    driver.recover()
    monkeypatch.setenv(LIBRARY, str(engine()))
    yield driver
    assert driver.findings() == []
    assert driver.taken() == {}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_promises_are_kept(precision: str, device: Emulated) -> None:
    """A psalm by `score`, and its end by `prefill` and `decode`."""
    text = (
        PARAGRAPH[:160] if precision == "f32" else None
    )  # a mean over more tokens is what a budget is of
    report = verify_artifact(demo_artifact(precision), DEMO, text=text, device="cuda:0")
    assert report.failures == ()


def test_text_is_the_same_in_every_way(device: Emulated) -> None:
    prompts = ["In the beginning", "And it came to pass", "The LORD"]
    options = {"max_new_tokens": 4, "temperature": 0, "stop_ids": []}
    with q35c.load(demo_artifact("f32"), device="cuda") as model:
        alone = [model.generate(prompt, **options) for prompt in prompts]
        assert model.generate(prompts, **options) == alone
        cache = model.cache(2**20)
        text = " ".join([*prompts, *alone]) * 3
        first = model.generate(text, cache=cache, **options)
        assert model.generate(text, cache=cache, **options) == first
        with model.session() as session:
            ids = model.tokenizer.encode(text)[:70]
            session.extend(ids[:64])
            saved = session.snapshot()
            want = session.prefill(ids[64:])
            session.restore(saved)
            np.testing.assert_array_equal(session.prefill(ids[64:]), want)


@NIGHTLY
def test_every_access_of_a_step_is_right(device: Emulated) -> None:
    """The same model on the checking machine: a short prompt, then the captured graph of decode, twice."""
    with q35c.load(demo_artifact("w4", is_checked=True)) as model, model.session() as session:
        session.prefill(model.tokenizer.encode("In the beginning"))
        assert np.isfinite([session.decode(token) for token in (5, 6)]).all()
