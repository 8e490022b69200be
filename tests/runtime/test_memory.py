"""R6, R17: memory is looked at before it is needed, in every place that limits it."""

from __future__ import annotations

from pathlib import Path

import pytest

import q35c
from q35c.artifact import Artifact, Manifest
from q35c.errors import MemoryRefused
from q35c.runtime import memory
from q35c.runtime.memory import Available, available_memory, check_memory, needed_bytes, state_bytes
from tests.fake_artifact import BATCH, CONTEXT, write_fake

MIB = 2**20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("memory") / "m.q35c"
    write_fake(place)
    return place


@pytest.fixture(scope="module")
def manifest(path: Path) -> Manifest:
    with q35c.load(path, threads=1) as loaded:
        return loaded.manifest


def fake_system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable: 8388608 kB\n"}  # 8 GiB


def test_machine_without_cgroups(tmp_path: Path) -> None:
    assert available_memory(fake_system(tmp_path, MEMINFO)) == Available(2**33, "machine")


def test_unreadable_system_does_not_refuse(tmp_path: Path) -> None:
    assert available_memory(tmp_path).bytes >= 2**60


def test_cgroup_v2_counts_page_cache_as_free(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user.slice/job"
    files = {
        "proc/self/cgroup": "0::/user.slice/job\n",
        f"{group}/memory.max": f"{1000 * MIB}\n",
        f"{group}/memory.current": f"{600 * MIB}\n",
        f"{group}/memory.stat": f"anon 1\ninactive_file {100 * MIB}\nactive_file {50 * MIB}\n",
    }
    have = available_memory(fake_system(tmp_path, MEMINFO | files))
    assert have.bytes == 550 * MIB and have.source.endswith("user.slice/job")


def test_the_tightest_ancestor_counts(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a/b\n"}
    for group, limit in (("a/b", "max"), ("a", str(300 * MIB)), ("", str(400 * MIB))):
        files[f"sys/fs/cgroup/{group}/memory.max"] = limit
        files[f"sys/fs/cgroup/{group}/memory.current"] = "0"
        files[f"sys/fs/cgroup/{group}/memory.stat"] = "anon 0"
    assert available_memory(fake_system(tmp_path, MEMINFO | files)).bytes == 300 * MIB


@pytest.mark.parametrize("visible", [True, False])
def test_cgroup_v1(tmp_path: Path, visible: bool) -> None:
    # In a container the path of the host is not there: the limit is at the top of the mount.
    group = "sys/fs/cgroup/memory" + ("/docker/x" if visible else "")
    files = {
        "proc/self/cgroup": "9:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n",
        f"{group}/memory.limit_in_bytes": str(200 * MIB),
        f"{group}/memory.usage_in_bytes": str(120 * MIB),
        f"{group}/memory.stat": f"inactive_file 1\ntotal_inactive_file {20 * MIB}\n",
    }
    if visible:
        files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = str(2**63 - 4096)
    assert available_memory(fake_system(tmp_path, MEMINFO | files)).bytes == 100 * MIB


def test_a_used_up_cgroup_has_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "1000",
        "sys/fs/cgroup/memory.current": "5000",
        "sys/fs/cgroup/memory.stat": "inactive_file 0",
    }
    assert available_memory(fake_system(tmp_path, MEMINFO | files)).bytes == 0


def test_the_plan_is_the_manifests_peak(manifest: Manifest) -> None:
    assert state_bytes(manifest, CONTEXT) == manifest.state.bytes
    beside = manifest.segments["code"].bytes + 2 * MIB
    assert needed_bytes(manifest, CONTEXT, BATCH) == manifest.memory.peak + beside
    assert state_bytes(manifest, 1) == 384 + 4096 + 4 * 32 * 32 + 4 * 32
    assert state_bytes(manifest, 33) == 384 + 4096 + 2 * 4 * 32 * 32 + 4 * 33 * 32


def test_one_byte_too_few_is_refused(manifest: Manifest) -> None:
    need = needed_bytes(manifest, CONTEXT, BATCH)
    check_memory(manifest, CONTEXT, BATCH, Available(need, "here"))
    for have in (need - 1, need // 2, need // 100, 0):
        with pytest.raises(MemoryRefused) as caught:
            check_memory(manifest, CONTEXT, BATCH, Available(have, "here"))
        assert str(need) in str(caught.value) and str(have) in str(caught.value)


def test_the_named_context_is_the_largest_that_fits(manifest: Manifest) -> None:
    have = Available(needed_bytes(manifest, 100, BATCH), "here")
    with pytest.raises(MemoryRefused, match="context=96 or less"):
        check_memory(manifest, CONTEXT, BATCH, have)
    check_memory(manifest, 96, BATCH, have)
    with pytest.raises(MemoryRefused):
        check_memory(manifest, 128, BATCH, have)
    only_one = Available(needed_bytes(manifest, 64, 1), "here")
    with pytest.raises(MemoryRefused, match="batch=1, context=64 or less"):
        check_memory(manifest, CONTEXT, BATCH, only_one)
    with pytest.raises(MemoryRefused, match="smaller precision"):
        check_memory(manifest, CONTEXT, BATCH, Available(manifest.weights_bytes, "here"))


def test_load_refuses_before_a_weight_is_read(
    path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("weights or code were touched")

    for name in ("verify_weights", "map_weights", "read_weights_into", "segment"):
        monkeypatch.setattr(Artifact, name, forbidden)
    have = Available(manifest.memory.peak - 1, "test")
    monkeypatch.setattr(memory, "available_memory", lambda: have)
    with pytest.raises(MemoryRefused):
        q35c.load(path)


def test_a_smaller_context_or_batch_loads(
    path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = Available(needed_bytes(manifest, 96, BATCH), "test")
    monkeypatch.setattr(memory, "available_memory", lambda: have)
    with q35c.load(path, threads=1, context=96) as loaded:
        assert loaded.context == 96
        with loaded.session() as session:
            assert session.context == 96
    with q35c.load(path, threads=1, batch=1) as loaded:
        assert loaded.generate([[1], [2]], 2, stop_ids=[])[1].timings.new_tokens == 2


def test_sessions_are_admitted_by_what_they_may_become(
    path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = manifest.state.bytes
    with q35c.load(path, threads=1) as loaded:
        have = Available(2 * full + full // 2, "test")
        monkeypatch.setattr(memory, "available_memory", lambda: have)
        first = loaded.session()
        second = loaded.session()
        with pytest.raises(MemoryRefused, match="context="):
            loaded.session()
        small = loaded.session(context=64)
        small.close()
        second.close()
        third = loaded.session()
        del first, third  # dropping a session without closing it gives its memory back, too
        assert loaded.session().context == loaded.session().context == CONTEXT


def test_scoring_checks_the_result_first(
    path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from q35c.runtime import session

    with q35c.load(path, threads=1) as loaded:
        have = Available(10 * 4 * loaded.vocab_size, "test")
        monkeypatch.setattr(session, "available_memory", lambda: have)
        assert loaded.score([1] * 10).shape == (10, loaded.vocab_size)
        with pytest.raises(MemoryRefused, match="logits"):
            loaded.score([1] * 11)
