"""A cache in files: what is read back changes no bit, and what cannot be used is skipped."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.errors import DiskRefused, OptionError
from q35c.runtime import state_file
from q35c.runtime.lease import last_cut
from q35c.runtime.prefix import PrefixCache
from q35c.serve.engine import Engine
from tests.fake_artifact import IM_END, write_fake, write_with_messages
from tests.prompts import conversations
from tests.serve.talk import ask, request

START = IM_END
PROMPTS = list(conversations(6, 25, vocab=250, start=START, most=1500))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("files") / "m.q35c"
    write_with_messages(place)
    return place


@pytest.fixture(scope="module")
def model(artifact: Path) -> Iterator[q35c.Model]:
    with q35c.load(artifact, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def kept(model: q35c.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with what was kept of the prompts."""
    directory = tmp_path_factory.mktemp("kept")
    cache = model.cache(1 << 28)
    for at, ids in enumerate(PROMPTS):
        fill(cache, ids, salt=str(at % 2))
    assert cache.save(directory) > 5
    assert cache.save(directory) == 0  # all is there
    cache.close()
    return directory


def fill(cache: PrefixCache, ids: list[int], salt: str) -> tuple[int, np.ndarray]:
    lease = cache.open(ids, len(ids) + 1, salt)
    logits = lease.fill()
    lease.end()
    return lease.cached_tokens, logits


def cold(model: q35c.Model, ids: list[int]) -> np.ndarray:
    with model.session() as session:
        if border := last_cut(len(ids)):
            session.extend(ids[:border])
        return session.prefill(ids[border:])


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*"))


def test_a_new_process_goes_on(artifact: Path, model: q35c.Model, kept: Path) -> None:
    before = len(files_of(kept))
    with q35c.load(artifact, threads=1) as again:
        cache = again.cache(1 << 28)
        assert cache.load(kept) == before and cache.cached_bytes > 0
        found = 0
        for at, ids in enumerate(PROMPTS):
            cached, logits = fill(cache, [*ids, 5], salt=str(at % 2))
            found += cached
            assert np.array_equal(logits, cold(model, [*ids, 5]))
        assert found > 0.5 * sum(map(len, PROMPTS))
        assert fill(cache, PROMPTS[0], salt="other")[0] == 0
        cache.close()


def test_files_are_the_owners_alone(kept: Path) -> None:
    (folder,) = kept.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_shared_beginnings_are_written_once(model: q35c.Model, tmp_path: Path) -> None:
    cache, system = model.cache(1 << 28), [START, *range(200), *range(200), *range(200), *range(39)]
    for at in range(3):
        fill(cache, [*system, START, 5, *range(at, at + 70), START, 6], "")
    cache.save(tmp_path)
    cache.close()
    sizes = [path.stat().st_size for path in files_of(tmp_path)]
    assert len(sizes) == 4 and max(sizes) > 4 * sorted(sizes)[-2]


def test_damaged_and_foreign_files_are_skipped(
    model: q35c.Model, kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "kept"
    shutil.copytree(kept, place)
    first, second, third, *_ = files_of(place)
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.write_bytes(b"")
    state_file.write_state(third, {"kind": "prefix", "digest": "0"}, [])
    (first.parent / "notes.txt").write_text("mine")
    (first.parent / f"folder{first.suffix}").mkdir()
    cache = model.cache(1 << 28)
    with caplog.at_level(logging.WARNING):
        added = cache.load(place)
    assert len(caplog.records) == 3 and 0 < added <= len(files_of(place)) - 5
    for at, ids in enumerate(PROMPTS[:6]):
        assert np.array_equal(fill(cache, ids, salt=str(at % 2))[1], cold(model, ids))
    cache.save(place)
    assert (first.parent / "notes.txt").exists()
    cache.close()


def test_another_models_files_are_not_looked_at(
    model: q35c.Model, kept: Path, tmp_path: Path
) -> None:
    write_fake(tmp_path / "o.q35c", context=2048, noise=0.5)
    with q35c.load(tmp_path / "o.q35c", threads=1) as other:
        cache = other.cache(1 << 28)
        assert cache.load(kept) == 0
        (own,) = set(kept.iterdir()) - {files_of(kept)[0].parent}
        for path in files_of(kept):
            shutil.copy(path, own)
        assert cache.load(kept) == 0
        cache.close()
        shutil.rmtree(own)


def test_only_what_fits_is_read(model: q35c.Model, kept: Path) -> None:
    whole = sum(path.stat().st_size for path in files_of(kept))
    for share in (0.0, 0.3):
        cache = model.cache(int(share * whole) or 1)
        cache.load(kept)
        assert cache.cached_bytes <= cache.max_bytes
        assert (cache.cached_bytes > 0) == (share > 0)
        cache.close()


def test_what_is_gone_is_removed(model: q35c.Model, kept: Path, tmp_path: Path) -> None:
    place = tmp_path / "kept"
    shutil.copytree(kept, place)
    cache = model.cache(1 << 28)
    fill(cache, PROMPTS[0], "")
    cache.save(place)
    assert 1 <= len(files_of(place)) <= 3
    cache.close()


def test_folders_that_others_can_write_to(model: q35c.Model, kept: Path, tmp_path: Path) -> None:
    place = tmp_path / "kept"
    shutil.copytree(kept, place)
    (folder,) = place.iterdir()
    folder.chmod(0o777)
    with pytest.raises(OptionError, match="others can write"):
        model.cache(1).load(place)
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", "", 5):
        with pytest.raises(OptionError):
            model.cache(1).load(bad)


def test_the_engine_writes_at_its_end(
    model: q35c.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = max(PROMPTS, key=len)
    engine = Engine(model, cache_bytes=1 << 28, cache_dir=tmp_path)
    (first,) = ask(engine, request(ids, 5))
    engine.close()
    assert files_of(tmp_path)
    engine = Engine(model, cache_bytes=1 << 28, cache_dir=tmp_path)
    (second,) = ask(engine, request(ids, 5))
    assert second.ids == first.ids and second.last.usage.cached_tokens > len(ids) - 128
    ask(engine, request([START, *range(200), START], 5))

    def full(*arguments: object) -> None:
        raise DiskRefused("full")

    monkeypatch.setattr("q35c.runtime.prefix_files.write_state", full)
    engine.close()  # it ends all the same
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
