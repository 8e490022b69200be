"""Checkpoints: a session comes back to them bit for bit, with its own keys and values or with copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.errors import ExecutionError, MemoryRefused, OptionError, PromptError
from q35c.layouts.cache import CELLS
from q35c.runtime import memory
from tests.fake_artifact import CONTEXT, VOCAB, write_fake
from tests.runtime.sequences import FAILING, one_shot, random_ids


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("rewind") / "m.q35c"
    write_fake(place, failing_token=FAILING)
    return place


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[q35c.Model]:
    with q35c.load(path, threads=1) as loaded:
        yield loaded


def test_extend_is_prefill_without_logits(model: q35c.Model) -> None:
    ids = random_ids(70)
    with model.session() as session:
        assert session.extend(ids[:50]) is None
        assert session.length == session.position == 50
        assert np.array_equal(session.prefill(ids[50:]), one_shot(model, ids))
        assert session.ids.tolist() == ids
        with pytest.raises(PromptError):
            session.extend([VOCAB])


def test_every_length_can_be_come_back_to(model: q35c.Model) -> None:
    first, second = random_ids(40, 1), random_ids(40, 2)
    for length in range(70):
        ids = random_ids(length, 3)
        with model.session() as session:
            if ids:
                session.prefill(ids)
            checkpoint = session.checkpoint()
            session.prefill(first)
            session.decode(5)
            session.rewind(checkpoint)
            assert session.length == session.position == length
            assert session.ids.tolist() == ids
            assert np.array_equal(session.prefill(second), one_shot(model, ids + second)), length


def test_a_checkpoint_is_small_and_holds_when_the_session_ends(model: q35c.Model) -> None:
    with model.session() as session:
        session.prefill(random_ids(200))
        checkpoint, snapshot = session.checkpoint(), session.snapshot()
    fixed = sum(t.bytes for t in model.manifest.state.tensors if t.growth == "fixed")
    assert checkpoint.bytes == fixed + 8 * 200 < snapshot.bytes


def test_other_tokens_are_refused(model: q35c.Model) -> None:
    with model.session() as session, model.session() as other:
        session.prefill([1, 2, 3])
        early = session.checkpoint()
        session.prefill([4, 5])
        late = session.checkpoint()
        session.rewind(early)
        for ids in ([], [4], [4, 6], [4, 6, 7]):
            session.rewind(early)
            if ids:
                session.prefill(ids)
            with pytest.raises(OptionError, match="tokens are not those"):
                session.rewind(late)
            assert session.length == 3 + len(ids)
        with pytest.raises(OptionError, match="tokens are not those"):
            other.rewind(early)
        other.restore(session.snapshot())
        other.rewind(early)  # a snapshot brings the tokens
        assert np.array_equal(other.prefill([9]), one_shot(model, [1, 2, 3, 9]))


def test_rewinding_heals_a_failure(model: q35c.Model) -> None:
    ids = random_ids(40)
    with model.session() as session:
        session.prefill(ids)
        checkpoint = session.checkpoint()
        with pytest.raises(ExecutionError):
            session.decode(FAILING)
        with pytest.raises(OptionError, match="undefined"):
            session.checkpoint()
        session.rewind(checkpoint)
        assert np.array_equal(session.prefill([7]), one_shot(model, [*ids, 7]))


def test_of_another_model(model: q35c.Model, tmp_path: Path) -> None:
    write_fake(tmp_path / "o.q35c", noise=0.5)
    with q35c.load(tmp_path / "o.q35c", threads=1) as other, other.session() as foreign:
        foreign.prefill(random_ids(40))
        with model.session() as session, pytest.raises(OptionError, match="another model"):
            session.rewind(foreign.checkpoint())
        with model.session() as session:
            session.prefill(random_ids(40))
            checkpoint = session.checkpoint()
            with pytest.raises(OptionError, match="cells stems from another model"):
                session.import_kv([foreign.export_kv(0, CELLS)], checkpoint)


def test_keys_and_values_go_to_another_session(model: q35c.Model) -> None:
    ids, more = random_ids(3 * CELLS + 5), random_ids(20, 4)
    with model.session() as session, model.session(150) as other:
        session.prefill(ids[: 2 * CELLS])
        checkpoint = session.checkpoint()
        session.prefill(ids[2 * CELLS :])
        cells = [session.export_kv(0, CELLS), session.export_kv(CELLS, 3 * CELLS)]
        other.prefill([1, 2, 3])
        other.import_kv(cells, checkpoint)
        assert other.length == 2 * CELLS and other.ids.tolist() == ids[: 2 * CELLS]
        assert np.array_equal(other.prefill(more), one_shot(model, ids[: 2 * CELLS] + more))
        assert cells[1].bytes == 2 * cells[0].bytes > 0


def test_wrong_ranges(model: q35c.Model) -> None:
    with model.session() as session, model.session(CELLS) as small:
        session.prefill(random_ids(2 * CELLS + 1))
        checkpoint = session.checkpoint()
        for start, end in ((0, 5), (1, CELLS), (CELLS, 0), (0, 3 * CELLS), (-CELLS, 0)):
            with pytest.raises(OptionError):
                session.export_kv(start, end)
        cells = [session.export_kv(0, CELLS), session.export_kv(CELLS, 2 * CELLS)]
        with pytest.raises(OptionError, match="tokens are missing"):
            session.import_kv(cells, checkpoint)
        with pytest.raises(OptionError, match="tokens are missing"):
            session.import_kv(cells[1:], checkpoint)
        with pytest.raises(OptionError, match="longer than the session"):
            small.import_kv(cells, checkpoint)
        assert session.length == 2 * CELLS + 1
    with pytest.raises(OptionError, match="closed"):
        session.export_kv(0, CELLS)


def test_a_context_can_be_changed(model: q35c.Model) -> None:
    ids = random_ids(30)
    with model.session(10) as session:
        session.prefill(ids[:10])
        with pytest.raises(PromptError):
            session.prefill(ids[10:])
        session.resize(30)
        assert np.array_equal(session.prefill(ids[10:]), one_shot(model, ids))
        for context in (29, CONTEXT + 1, 0, "30"):
            with pytest.raises(OptionError):
                session.resize(context)
        assert session.context == 30


def test_a_larger_context_needs_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have = memory.Available(2**40, "test")
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_memory", lambda: have)
        with q35c.load(path, threads=1) as model, model.session(32) as session:
            session.prefill([1])
            have = memory.Available(0, "test")
            with pytest.raises(MemoryRefused):
                session.resize(CONTEXT)
            assert session.context == 32
            with pytest.raises(MemoryRefused):
                model.session(32)
            session.resize(1)  # what is touched already is not asked for again
            have = memory.Available(2**40, "test")
            session.resize(CONTEXT)
            assert session.context == CONTEXT
