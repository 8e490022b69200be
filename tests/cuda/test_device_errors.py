"""What can be wrong with a device: each is one typed error that says what to do, and models on the CPU live on."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.errors import (
    ArtifactError,
    DeviceError,
    DeviceFault,
    IncompatibleDevice,
    NoDevice,
    OptionError,
    OutOfDeviceMemory,
)
from q35c.runtime.cuda import blocks
from q35c.runtime.cuda.context import fits
from q35c.runtime.cuda.driver import FUNCTIONS, LIBRARY
from tests.cuda.emulated import Emulated
from tests.cuda.fake_cuda import bigrams, write_fake_cuda
from tests.fake_artifact import write_fake


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("errors") / "cuda.q35c"
    write_fake_cuda(path, bigram=bigrams())
    return path


@pytest.mark.parametrize(
    ("variable", "value", "error", "words"),
    [
        (LIBRARY, "/nowhere/libcuda.so.1", NoDevice, ("no NVIDIA driver", "--target cpu")),
        (LIBRARY, "libc.so.6", NoDevice, ("no NVIDIA driver", "cuDriverGetVersion")),
        ("FAKECUDA_VERSION", "12080", NoDevice, ("too old", "13.0", "580", "12.8")),
        ("FAKECUDA_DEVICES", "0", NoDevice, ("no device", "NO_DEVICE", "nvidia-smi")),
        ("FAKECUDA_VIRTUAL_MEMORY", "0", NoDevice, ("virtual memory management",)),
        ("FAKECUDA_CC", "7.5", IncompatibleDevice, ("7.5", "emulated", "--target cuda:sm_75")),
        ("FAKECUDA_SHARED", "49152", IncompatibleDevice, ("65536 bytes", "49152")),
    ],
)
def test_a_device_that_cannot_serve_is_refused_before_anything_is_taken(
    path: Path, emulated: Emulated, monkeypatch: pytest.MonkeyPatch,
    variable: str, value: str, error: type[Exception], words: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    with pytest.raises(error) as caught:
        q35c.load(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not emulated.live().keys() & {"memory", "pinned", "context"}


@pytest.mark.parametrize(
    ("architecture", "capability", "expected"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_89", (8, 6), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("sm_120", (10, 0), False),
        ("emulated", (8, 0), False),
        ("emulated", (0, 0), True),
        ("sm_80", (0, 0), False),
    ],
)
def test_images_fit_by_compute_capability(architecture: str, capability: tuple[int, int], expected: bool) -> None:  # fmt: skip
    assert fits(architecture, capability) is expected


@pytest.mark.parametrize("device", ["cuda:1", "cuda:999"])
def test_a_device_that_is_not_there_is_named(path: Path, emulated: Emulated, device: str) -> None:
    with pytest.raises(NoDevice, match=rf"no such device(.|\n)*cuda:0 to cuda:0(.|\n)*{device}"):
        q35c.load(path, device=device)


@pytest.mark.parametrize(
    "device", ["gpu", "cuda:", "cuda:-1", "cuda:1000", "cuda:x", "cpu:0", "", 0]
)
def test_names_of_devices_are_checked(path: Path, emulated: Emulated, device: object) -> None:
    with pytest.raises(OptionError, match="device"):
        q35c.load(path, device=device)  # type: ignore[arg-type]


def test_device_and_artifact_must_be_of_one_kind(path: Path, emulated: Emulated, tmp_path: Path) -> None:  # fmt: skip
    write_fake(tmp_path / "cpu.q35c")
    for artifact, device in ((path, "cpu"), (tmp_path / "cpu.q35c", "cuda:0")):
        with pytest.raises(
            OptionError, match=f"another kind of device(.|\n)*--target {device[:3]}"
        ):
            q35c.load(artifact, device=device)
    with pytest.raises(OptionError, match="threads"):
        q35c.load(path, threads=2)


def test_damage_is_found_before_it_reaches_the_device(path: Path, emulated: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(blocks, "STAGING_BYTES", 40_000)  # weights pass in eight pieces
    with q35c.load(path) as model:
        weights = model.manifest.weights_bytes
    data = bytearray(path.read_bytes())
    for place in (len(data) - weights + 100, len(data) - 90, len(data) - weights - 1000):
        damaged = bytearray(data)
        damaged[place] ^= 1
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ArtifactError, match="hash does not match"):
            q35c.load(tmp_path / "damaged")
        assert emulated.taken() == {}


def test_weights_that_pass_in_pieces_arrive_whole(path: Path, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    found = []
    for size in (40_000, 2**20):
        monkeypatch.setattr(blocks, "STAGING_BYTES", size)
        with q35c.load(path) as model:
            found.append(model.score(range(3, 60)))
    assert np.array_equal(*found)


def test_memory_is_compared_with_the_plan_first(path: Path, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("FAKECUDA_MEMORY", str(2 << 20))
    with pytest.raises(
        OutOfDeviceMemory, match=r"emulated device(.|\n)*expected: \d+ bytes(.|\n)*2097152"
    ):
        q35c.load(path)
    assert "memory" not in emulated.live()


def test_sessions_share_the_memory_that_is_left(path: Path, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    with q35c.load(path) as model:
        with model.session() as session:
            before = emulated.live()["bytes"]
            session.prefill([3])
            one = emulated.live()["bytes"] - before
        del session
        monkeypatch.setenv("FAKECUDA_MEMORY", str(before + 2 * one))
        first, second = model.session(), model.session()
        with pytest.raises(OutOfDeviceMemory, match="a session of"):
            model.session()
        first.prefill([3])
        second.prefill([3])
        first.close()
        del first
        with model.session() as third:  # in the first one's place
            third.prefill([3])
        second.reset()
        assert emulated.live()["bytes"] == before + one


def test_kept_prompts_give_way_to_new_ones(path: Path, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    prompts = [[*range(start, start + 100)] for start in (3, 40, 80, 120)]
    options = {"max_new_tokens": 3, "temperature": 0, "stop_ids": []}
    with q35c.load(path, verify=False) as model:
        cache = model.cache(2**30)
        want = [list(model.generate(ids, **options).ids) for ids in prompts]
        gc.collect()
        with model.session() as session:
            session.prefill(prompts[0])
            monkeypatch.setenv("FAKECUDA_MEMORY", str(int(1.5 * emulated.live()["bytes"])))
        del session
        found = [list(model.generate(ids, cache=cache, **options).ids) for ids in prompts * 2]
        assert found == want * 2
        del cache


def test_a_fault_names_the_entry_and_ends_the_device_alone(emulated: Emulated, tmp_path: Path) -> None:  # fmt: skip
    write_fake_cuda(tmp_path / "cuda.q35c", bigram=bigrams(), failing_token=77)
    write_fake(tmp_path / "cpu.q35c", bigram=bigrams())
    with q35c.load(tmp_path / "cpu.q35c") as cpu, cpu.session() as beside:
        model = q35c.load(tmp_path / "cuda.q35c")
        session, other = model.session(), model.session()
        saved = session.snapshot()
        session.prefill([3, 4])
        with pytest.raises(DeviceFault, match=r"entry decode(.|\n)*ILLEGAL_ADDRESS") as caught:
            session.decode(77)
        assert emulated.findings() == ["out of bounds: kernel append_kernel"]
        emulated.watch()
        for found in (
            fault_of(other.snapshot),
            fault_of(other.prefill, [3]),
            fault_of(session.restore, saved),
            fault_of(model.session),
        ):
            assert found.code == caught.value.code
            assert "has failed before" in str(found) and "entry decode" in str(found)
        model.close()
        assert set(emulated.calls()) <= {"cuDevicePrimaryCtxRelease_v2"}
        assert np.isfinite(beside.prefill([3, 4])).all()
        del session, other, model
        emulated.recover()  # in a new process the file works
        with q35c.load(tmp_path / "cuda.q35c") as again_loaded:
            assert np.isfinite(again_loaded.score([3, 4])).all()


def fault_of(call: Callable[..., object], *arguments: object) -> DeviceFault:
    with pytest.raises(DeviceFault) as caught:
        call(*arguments)
    return caught.value


def test_what_is_closed_or_forgotten_is_given_back(path: Path, emulated: Emulated) -> None:
    model = q35c.load(path)
    session = model.session()
    session.prefill([3])
    assert emulated.taken()["context"] == 1
    model.close()
    model.close()
    assert emulated.taken() == {}  # though the session is still open
    with pytest.raises(OptionError, match="closed"):
        session.decode(4)
    q35c.load(path).session().prefill([3])  # neither closed; the fixture looks
    del session


def test_any_thread_may_use_the_device(path: Path, emulated: Emulated) -> None:
    found: dict[int, np.ndarray] = {}
    with q35c.load(path) as model:

        def work(number: int) -> None:
            with model.session() as session:
                for _ in range(5):
                    session.reset()
                    session.extend(range(3, 20))
                    saved = session.snapshot()
                    session.decode(5)
                    session.restore(saved)
                found[number] = session.decode(6)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = model.score([*range(3, 20), 6])[-1]
    assert all(np.array_equal(found[number], expected) for number in range(4))


_FORK = """
import os, sys, q35c
from q35c.errors import NoDevice, OptionError
model = q35c.load(sys.argv[1])
session = model.session()
session.prefill([3])
if os.fork() == 0:
    for call, error, words in (
        (lambda: session.decode(4), OptionError, "forked"),
        (lambda: q35c.load(sys.argv[1]), NoDevice, "forked from one that had used CUDA"),
    ):
        try:
            call()
        except error as caught:
            assert words in str(caught), caught
        else:
            os._exit(1)
    model.close()
    del session, model
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
print(session.decode(4).argmax())
"""


def test_a_child_of_a_process_that_used_the_device_is_told(path: Path, emulated: Emulated) -> None:
    command = [sys.executable, "-W", "error", "-c", _FORK, str(path)]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip().isdigit()


def test_every_call_is_typed_and_offered_by_the_emulated_driver(emulated: Emulated) -> None:
    import ctypes

    library = ctypes.CDLL(str(emulated.path))
    assert [name for name in FUNCTIONS if not hasattr(library, name)] == []


def test_code_that_the_driver_does_not_take_is_a_device_error(emulated: Emulated, tmp_path: Path) -> None:  # fmt: skip
    from tests.cuda import fake_cuda

    real = fake_cuda.image
    cubin = bytearray(real())
    cubin[18:20] = (190).to_bytes(2, "little")  # EM_CUDA
    fake_cuda.image = lambda *_: bytes(cubin)  # type: ignore[assignment]
    try:
        write_fake_cuda(tmp_path / "cubin.q35c")
    finally:
        fake_cuda.image = real
    with pytest.raises(DeviceError, match=r"loading(.|\n)*cuModuleLoadData: CUDA_ERROR_NO_BINARY"):
        q35c.load(tmp_path / "cubin.q35c")
