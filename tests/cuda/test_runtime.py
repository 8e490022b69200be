"""A fake model on the emulated driver: the same bits as on the CPU, whatever is done with sessions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import q35c
from tests.cuda.emulated import Emulated
from tests.cuda.fake_cuda import bigrams, write_fake_cuda
from tests.fake_artifact import BATCH, MAX_TOKENS, write_fake


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fake")
    write_fake(folder / "cpu.q35c", bigram=bigrams())
    write_fake_cuda(folder / "cuda.q35c", bigram=bigrams())
    return folder / "cpu.q35c", folder / "cuda.q35c"


@pytest.fixture
def models(artifacts: tuple[Path, Path], emulated: Emulated) -> Iterator[tuple[q35c.Model, q35c.Model]]:  # fmt: skip
    with q35c.load(artifacts[0]) as cpu, q35c.load(artifacts[1], device="cuda:0") as cuda:
        yield cpu, cuda


def test_every_entry_gives_the_bits_of_the_cpu(models: tuple[q35c.Model, q35c.Model]) -> None:
    ids = [*range(3, 50)]
    found = []
    for model in models:
        with model.session() as session:
            logits = [session.prefill(ids[:MAX_TOKENS])]  # a whole piece, captured
            session.extend(ids[MAX_TOKENS:40])  # a whole piece and a part of one
            logits += [session.prefill(ids[40:]), *session.score([7, 8, 9]), session.decode(5)]
            found.append(np.stack([*logits, session.decode(6)]))
    assert np.array_equal(found[0], found[1])


def test_a_batch_of_any_size_gives_the_bits_of_single_sequences(models: tuple[q35c.Model, q35c.Model]) -> None:  # fmt: skip
    model = models[1]
    prompts = [[5, 6], [7], [8, 9, 10], [11]]
    alone = []
    for ids in prompts:
        with model.session() as session:
            session.extend(ids)
            alone.append([session.decode(20 + step) for step in range(3)])
    for size in range(1, BATCH + 1):
        sessions = [model.session() for _ in range(size)]
        for session, ids in zip(sessions, prompts, strict=False):
            session.extend(ids)
        for step in range(3):
            order = [*range(step % size, size), *range(step % size)]  # rows change places
            rows = [sessions[index] for index in order]
            logits = q35c.Session.decode_together(rows, [20 + step] * size)
            for row, index in zip(logits, order, strict=True):
                assert np.array_equal(row, alone[index][step])


def test_one_graph_of_a_batch_size_serves_every_step(models: tuple[q35c.Model, q35c.Model], emulated: Emulated) -> None:  # fmt: skip
    with models[1].session() as session, models[1].session() as other:
        session.extend([3])
        session.decode(4)
        before, _ = emulated.live(), emulated.watch()
        for token in (5, 6, 7):
            session.decode(token)
            other.decode(token)
        calls = emulated.calls()
        assert calls["cuGraphLaunch"] == 6
        assert not calls.keys() & {"cuLaunchKernel", "cuStreamBeginCapture_v2", "cuMemAlloc_v2"}
        assert emulated.live()["launches"] - before["launches"] == 12


def test_saved_states_come_back(models: tuple[q35c.Model, q35c.Model], tmp_path: Path) -> None:
    found = []
    for model in models:
        with model.session() as session, model.session() as other:
            session.extend(range(3, 67))
            saved, point = session.snapshot(), session.checkpoint()
            first = session.score([80, 81, 82])
            session.restore(saved)
            assert np.array_equal(session.score([80, 81, 82]), first)
            session.rewind(point)
            assert np.array_equal(session.score([80, 81, 82]), first)
            saved.save(tmp_path / "state")
            other.restore(q35c.Snapshot.read(tmp_path / "state"))
            assert np.array_equal(other.score([80, 81, 82]), first)
            cells = session.export_kv(0, 32)
            other.reset()
            other.import_kv([cells, session.export_kv(32, 64)], point)
            assert np.array_equal(other.score([80, 81, 82]), first)
            session.reset()
            found.append((*saved.tensors, first, session.prefill([3, 4])))
    for cpu, cuda in zip(*found, strict=True):
        assert np.array_equal(cpu, cuda)
