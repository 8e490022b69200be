"""Snapshots in files: they come back bit for bit, and whatever else lies there is refused."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.errors import DiskRefused, OptionError, Q35CError, StateError
from q35c.runtime import Snapshot, state_file
from q35c.runtime.state_file import read_state, write_state
from tests.fake_artifact import VOCAB, write_fake


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    place = tmp_path_factory.mktemp("state") / "m.q35c"
    write_fake(place)
    with q35c.load(place, threads=1) as loaded:
        yield loaded


def random_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


@pytest.mark.parametrize("count", [0, 1, 33, 200])
def test_a_session_goes_on_from_a_file(model: q35c.Model, tmp_path: Path, count: int) -> None:
    path = tmp_path / "s.state"
    with model.session() as session, model.session() as other:
        if count:
            session.prefill(random_ids(count))
        session.snapshot().save(path)
        other.restore(Snapshot.read(path))
        assert other.length == other.position == count
        assert np.array_equal(other.ids, session.ids)
        assert np.array_equal(other.decode(5), session.decode(5))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_safetensors_reads_the_layout(model: q35c.Model, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    with model.session() as session:
        session.prefill([1, 2, 3])
        snapshot = session.snapshot()
    snapshot.save(tmp_path / "s")
    loaded = safetensors.load_file(tmp_path / "s")
    assert loaded["0"].tolist() == [1, 2, 3]
    for number, tensor in enumerate(snapshot.tensors):
        assert np.array_equal(loaded[str(number + 1)], tensor)


def test_every_type_comes_back(tmp_path: Path) -> None:
    arrays = [np.arange(6).reshape(2, 3).astype(kind) for kind in ("<f4", "<u2", "<i4", "i1", "u1")]
    write_state(tmp_path / "s", {"a": "ü\n"}, [*arrays, np.empty((0, 4), "<f4"), arrays[0].T])
    metadata, found = read_state(tmp_path / "s")
    assert metadata["a"] == "ü\n"
    for array, want in zip(found, [*arrays, np.empty((0, 4), "<f4"), arrays[0].T], strict=True):
        assert array.dtype == want.dtype and np.array_equal(array, want)


def test_another_model_or_shape_is_refused(model: q35c.Model, tmp_path: Path) -> None:
    write_fake(tmp_path / "o.q35c", noise=0.5)
    with q35c.load(tmp_path / "o.q35c", threads=1) as other, other.session() as session:
        session.prefill([1, 2, 3])
        session.snapshot().save(tmp_path / "s")
    with model.session() as session:
        with pytest.raises(OptionError, match="another model"):
            session.restore(Snapshot.read(tmp_path / "s"))
        session.prefill([1, 2, 3])
        snapshot = session.snapshot()
        for tensors in (
            snapshot.tensors[:-1],
            (*snapshot.tensors[:-1], snapshot.tensors[-1][:, :1]),
            (*snapshot.tensors[:-1], snapshot.tensors[-1].astype("<f8")),
        ):
            wrong = Snapshot(snapshot.digest, 3, 3, tensors, snapshot.ids)
            with pytest.raises(OptionError, match="shape"):
                session.restore(wrong)


def test_every_damage_is_noticed(model: q35c.Model, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with model.session() as session:
        session.prefill([1, 2, 3])
        session.snapshot().save(path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(0, 400, 3), *rng.integers(400, len(data), 50).tolist(), len(data) - 1]
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(StateError):
            Snapshot.read(path)
    for size in (0, 7, 8, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(StateError):
            Snapshot.read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(StateError):
        Snapshot.read(path)
    path.write_bytes(data)
    assert Snapshot.read(path).length == 3


def with_header(change: Callable[[dict], object]) -> bytes:
    """Return a file with this header, changed."""
    document = {
        "__metadata__": {"sha256": "0" * 64, "format": state_file.FORMAT, "kind": "snapshot"},
        "0": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]},
    }
    change(document)
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: None,
        lambda d: d.pop("__metadata__"),
        lambda d: d["__metadata__"].pop("sha256"),
        lambda d: d["__metadata__"].update(format="q35c state 9"),
        lambda d: d["__metadata__"].update(length=3),
        lambda d: d["0"].update(dtype="F64"),
        lambda d: d["0"].update(shape=[-1]),
        lambda d: d["0"].update(shape=[2**50]),
        lambda d: d["0"].update(shape="1"),
        lambda d: d["0"].update(data_offsets=[0, 8]),
        lambda d: d["0"].update(data_offsets=[4, 8]),
        lambda d: d.update({"2": d.pop("0")}),
        lambda d: d.update({"1": []}),
    ],
)
def test_headers_that_lie(tmp_path: Path, change: Callable[[dict], object]) -> None:
    (tmp_path / "s").write_bytes(with_header(change))
    with pytest.raises(StateError):
        Snapshot.read(tmp_path / "s")


def test_what_is_no_file(tmp_path: Path, model: q35c.Model) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(StateError, match="cannot read"):
            Snapshot.read(path)
    with model.session() as session:
        snapshot = session.snapshot()
    for path in (tmp_path, tmp_path / "none" / "s", ""):
        with pytest.raises(OptionError):
            snapshot.save(path)


def test_a_full_disk_leaves_the_old_file(
    model: q35c.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with model.session() as session:
        session.snapshot().save(path)
        before = path.read_bytes()
        session.prefill([1])

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DiskRefused):
            session.snapshot().save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert issubclass(StateError, Q35CError)
