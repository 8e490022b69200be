"""Loading: options, verification, CPU features, threads, and how little is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import q35c
from q35c.artifact.target import CpuTarget
from q35c.cpuinfo import processor_flags
from q35c.errors import (
    ArtifactError,
    IncompatibleCPU,
    MemoryRefused,
    OptionError,
    Q35CWarning,
    UnsupportedMachine,
)
from q35c.runtime import load
from q35c.runtime.cpu import device, machine
from q35c.runtime.cpu.blocks import Region
from q35c.runtime.cpu.machine import check_target, choose_threads, default_threads
from tests.fake_artifact import BATCH, manifest_fields, script, write_fake

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("load") / "m.q35c"
    write_fake(place, bigram=script("0123"))
    return place


def damaged_weights(path: Path, target: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("mmap", [True, False])
def test_weights_mapped_or_copied(path: Path, mmap: bool) -> None:
    with q35c.load(path, threads=1, mmap=mmap) as loaded:
        assert loaded.generate("0") == "123"


@pytest.mark.parametrize("mmap", [True, False])
def test_verification_of_weights(path: Path, tmp_path: Path, mmap: bool) -> None:
    damaged = damaged_weights(path, tmp_path / "damaged")
    for verify in (None, True):  # this small file is verified by default
        with pytest.raises(ArtifactError, match="weights"):
            q35c.load(damaged, threads=1, verify=verify, mmap=mmap)
    with q35c.load(damaged, threads=1, verify=False, mmap=mmap) as loaded:
        assert loaded.generate("0") == "123"


def test_large_weights_are_verified_on_demand(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = damaged_weights(path, tmp_path / "damaged")
    size = q35c.load(path, threads=1).manifest.weights_bytes
    monkeypatch.setattr(load, "VERIFY_BYTES", size - 1)
    q35c.load(damaged, threads=1).close()
    with pytest.raises(ArtifactError):
        q35c.load(damaged, threads=1, verify=True)
    monkeypatch.setattr(load, "VERIFY_BYTES", size)
    with pytest.raises(ArtifactError):
        q35c.load(damaged, threads=1)


def test_code_is_mapped_only_after_every_check(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forbidden:
        def __init__(self, code: bytes) -> None:
            raise AssertionError("code was loaded")

    monkeypatch.setattr(device, "Library", Forbidden)
    with pytest.raises(AssertionError):
        q35c.load(path)
    with pytest.raises(ArtifactError):
        q35c.load(damaged_weights(path, tmp_path / "weights"))
    data = path.read_bytes()
    for marker in (b"\x7fELF", b"q35c-plan:", b"<|im_end|>"):  # the last: in the chat template
        at = data.index(marker)
        (tmp_path / "code").write_bytes(data[:at] + b"?" + data[at + 1 :])
        with pytest.raises(ArtifactError):
            q35c.load(tmp_path / "code")
    monkeypatch.setattr(machine, "processor_flags", lambda: frozenset())
    with pytest.raises(IncompatibleCPU):
        q35c.load(path)


def test_missing_instructions_are_named(tmp_path: Path) -> None:
    target = {
        "backend": "cpu",
        "name": "cpu:x86-64-v9",
        "cpu_features": ["sse2", "avx1024"],
        "lanes": 32,
    }
    write_fake(tmp_path / "m", target=target)
    with pytest.raises(IncompatibleCPU, match="missing: avx1024"):
        q35c.load(tmp_path / "m")


def test_cpu_features_of_a_system(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nflags\t\t: fpu avx2 fma\nflags : none\n"
    )
    features = processor_flags(tmp_path / "proc/cpuinfo")
    assert features == {"fpu", "avx2", "fma"}
    check_target(CpuTarget("cpu", "cpu:x86-64-v3", ("avx2", "fma"), 8), features)
    with pytest.raises(IncompatibleCPU):
        check_target(CpuTarget("cpu", "cpu:x86-64-v4", ("avx2", "avx512f"), 16), features)
    assert "sse2" in processor_flags()


def test_a_machine_that_does_not_tell_is_not_one_that_lacks(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "processor_flags", lambda: processor_flags(tmp_path / "cpuinfo"))
    with pytest.raises(UnsupportedMachine, match=r"cpuinfo: .*No such file") as caught:
        q35c.load(path)
    assert not isinstance(caught.value, IncompatibleCPU)
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: asimd fp\n")
    assert processor_flags(tmp_path / "cpuinfo") == {"asimd", "fp"}


@pytest.mark.parametrize("threads", [0, -1, 1.0, True, "2"])
def test_thread_counts_that_are_refused(path: Path, threads: Any) -> None:
    with pytest.raises(OptionError, match="threads: value is not allowed"):
        q35c.load(path, threads=threads)


def test_thread_count_is_bounded_by_the_plan() -> None:
    assert choose_threads(1, 1) == 1
    with pytest.warns(Q35CWarning, match="compiled for at most 1"):
        assert choose_threads(2, 1) == 1
    assert choose_threads(None, 1) == 1
    assert 1 <= choose_threads(None, 1024) <= (os.cpu_count() or 1)


def test_thread_count_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("Q35C_THREADS", "1")
    assert choose_threads(None, 8) == 1
    with pytest.warns(Q35CWarning, match="Q35C_THREADS 999 is too many"):
        monkeypatch.setenv("Q35C_THREADS", "999")
        assert choose_threads(None, 1) == 1
    for text in ("0", "-1", "two", "", "1.5", "9" * 5000):
        monkeypatch.setenv("Q35C_THREADS", text)
        with pytest.raises(OptionError) as caught:
            choose_threads(None, 8)
        assert caught.value.where == "Q35C_THREADS"
        assert choose_threads(1, 8) == 1  # an argument wins


def test_default_threads_are_physical_cores_within_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6})
    for number, siblings in enumerate(("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7")):
        place = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(siblings + "\n")
    assert default_threads(tmp_path) == 4

    def limited(name: str, cgroup: str, files: dict[str, str]) -> Path:
        root = tmp_path / name
        root.mkdir()
        (root / "sys").mkdir()
        (root / "sys/devices").symlink_to(tmp_path / "sys/devices")
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(cgroup)
        for file, text in files.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(text)
        return root

    v2 = {"sys/fs/cgroup/a/cpu.max": "250000 100000\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}
    assert default_threads(limited("v2", "0::/a\n", v2)) == 2
    v1 = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    assert default_threads(limited("v1", "3:cpu,cpuacct:/x\n", v1)) == 1
    free = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    assert default_threads(limited("free", "3:cpu:/\n", free)) == 4


@pytest.mark.parametrize("name", ["context", "batch"])
@pytest.mark.parametrize("value", [0, -1, 10**6, 1.5, True])
def test_limits_are_checked(path: Path, name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        q35c.load(path, **{name: value})
    assert caught.value.where == name


def test_a_batch_beyond_the_compiled_one(path: Path) -> None:
    with q35c.load(path, batch=3 * BATCH + 1, threads=1) as model:
        assert model.batch == 3 * BATCH + 1 > model.manifest.batch
        prompts = [[token] for token in range(1, 3 * BATCH + 2)]
        together = model.generate(prompts, 5, temperature=0)
    with q35c.load(path, threads=1) as model:
        assert together == model.generate(prompts, 5, temperature=0)


def test_a_refused_load_closes_the_file(path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    q35c.load(path, threads=1).close()
    before = open_files()
    for _ in range(5):
        with pytest.raises(OptionError):
            q35c.load(path, threads=0)
        with pytest.raises(ArtifactError):
            q35c.load(Path("/dev/null"))
    assert open_files() == before


def test_a_closed_model_refuses(path: Path) -> None:
    loaded = q35c.load(path, threads=1)
    session = loaded.session()
    loaded.close()
    loaded.close()
    with pytest.raises(OptionError, match="closed"):
        session.prefill([1])


def test_entries_go_by_what_they_can_do(path: Path, tmp_path: Path) -> None:
    """Other names change nothing; without an entry that scores, the one that decodes does it token by token."""
    entries = [{**entry, "name": f"e{i}"} for i, entry in enumerate(manifest_fields()["entries"])]
    without_score = [entry for entry in entries if entry["symbol"] != "score"]
    ids = list(range(40))
    with q35c.load(path) as loaded, loaded.session() as session:
        expected = loaded.score(ids), session.prefill(ids), session.decode(7)
    for number, kept in enumerate((entries, without_score)):
        write_fake(tmp_path / f"{number}", bigram=script("0123"), entries=kept)
        with q35c.load(tmp_path / f"{number}") as other, other.session() as session:
            assert other.manifest.text_entries.all.symbol == ("score", "decode")[number]
            got = other.score(ids), session.prefill(ids), session.decode(7)
        for one, two in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, two)


def test_address_space_that_does_not_suffice() -> None:
    with pytest.raises(MemoryRefused, match="address space"):
        Region(2**50)


def test_regions_are_zero_aligned_and_give_memory_back() -> None:
    region = Region(10_000, huge_bytes=5_000)
    assert region.address % 4096 == 0
    view = region.view("f32", (10, 10), 64)
    assert not view.any()
    view[:] = 1
    region.zero()
    assert not view.any()
    del region
    view[:] = 2  # a view keeps the memory alive
    assert np.all(view == 2)


def test_lean_import() -> None:
    """`import q35c` is small, and neither loading nor decoding ids drags in more than numpy."""
    program = """
import json, sys
import q35c

def peak():  # not ru_maxrss, which a child inherits from its parent
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0])

bare = peak()
heavy = ("torch", "transformers", "tvm", "tvm_ffi", "safetensors", "tokenizers", "jinja2", "click")
early = [name for name in ("numpy", *heavy) if name in sys.modules]
model = q35c.load(sys.argv[1], threads=1)
ids = model.generate([48], temperature=0, stop_ids=[256], stop=None).ids
rooms = ("ir", "frontend", "passes", "codegen", "compile")
late = [name for name in heavy if name in sys.modules and name != "tokenizers"]
late += [room for room in rooms if f"q35c.{room}" in sys.modules]
print(json.dumps([bare, early, late, ids, peak()]))
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_fake(Path(folder) / "m", segments={}, bigram=script("0123"))
        done = subprocess.run(
            [sys.executable, "-c", program, f"{folder}/m"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stderr
    bare, early, late, ids, whole = json.loads(done.stdout)
    assert early == [] and late == []
    assert ids == [49, 50, 51, 256]
    assert bare <= 30 * 1024 and whole <= 60 * 1024  # KiB


def test_more_threads_than_cpus_are_not_started(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.warns(Q35CWarning, match=r"threads 8 is too many: 1 are used \(1 CPUs") as said:
        loaded = q35c.load(path, threads=8)
    assert loaded.threads == 1
    assert said[0].filename == __file__  # where the caller can look
    loaded.close()


def test_a_closed_model_refuses_every_use(path: Path) -> None:
    loaded = q35c.load(path, threads=1)
    tokenizer = loaded.tokenizer
    loaded.close()
    for use in (
        loaded.session,
        lambda: loaded.generate("0"),
        lambda: loaded.generate("0", stream=True),
        lambda: loaded.score([1]),
        lambda: loaded.apply_chat_template([{"role": "user", "content": "a"}]),
    ):
        with pytest.raises(OptionError, match="closed"):
            use()
    assert loaded.tokenizer is tokenizer and loaded.vocab_size > 0  # what needs no file
    other = q35c.load(path, threads=1)
    other.close()
    with pytest.raises(OptionError, match="closed"):
        _ = other.tokenizer


def test_the_context_is_chosen_at_load(tmp_path: Path) -> None:
    place = tmp_path / "m.q35c"
    write_fake(place, bigram=script("0123"), context=64, max_context=512)
    with q35c.load(place) as model:
        assert model.context == 64
        assert len(model.generate([1] * 60, max_new_tokens=-1).ids) == 5
        with pytest.raises(OptionError, match="context"):
            model.session(65)
    with q35c.load(place, context=512) as model:
        assert model.context == 512
        assert len(model.generate([1] * 500, max_new_tokens=-1).ids) == 13
    with pytest.raises(OptionError) as caught:
        q35c.load(place, context=513)
    assert "512" in str(caught.value) and "513" in str(caught.value)


def test_memory_is_asked_for_the_chosen_context(tmp_path: Path) -> None:
    place = tmp_path / "m.q35c"
    manifest = write_fake(place, context=64, max_context=1 << 20)
    assert manifest.state.bytes > 1 << 28
    assert manifest.memory.state_per_sequence < 1 << 16
    with q35c.load(place) as model, model.session() as session:
        session.prefill([1, 2])
