"""Every call of the driver fails once: a typed error that names it, nothing is left taken, and the CPU goes on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import q35c
from q35c.errors import DeviceError, DeviceFault, NoDevice, OutOfDeviceMemory, Q35CError
from q35c.runtime.cuda.driver import FUNCTIONS
from tests.cuda.emulated import Emulated
from tests.cuda.fake_cuda import bigrams, write_fake_cuda
from tests.fake_artifact import write_fake

OUT_OF_MEMORY, INVALID, FAULT = 2, 1, 719
# What gives back may fail without a word where nobody can do anything about it, and is not given back then.
GIVES_BACK = {
    "cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2", "cuMemFree_v2", "cuMemFreeHost", "cuMemAddressFree", "cuMemRelease",
    "cuMemUnmap", "cuStreamDestroy_v2", "cuGraphDestroy", "cuGraphExecDestroy", "cuEventDestroy_v2", "cuModuleUnload",
}  # fmt: skip
UNSEEN = {"cuDriverGetVersion", "cuGetErrorName", "cuEventSynchronize"}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("injection")
    write_fake(folder / "cpu.q35c", bigram=bigrams())
    write_fake_cuda(folder / "cuda.q35c", bigram=bigrams())
    return folder / "cpu.q35c", folder / "cuda.q35c"


def live_a_life(path: Path) -> np.ndarray:
    """Do with a model all that can be done; return what is left of it."""
    with q35c.load(path) as model, model.session() as session, model.session() as other:
        logits = [session.prefill(range(3, 19))]
        session.extend([4, 5])
        saved = session.snapshot()
        other.restore(saved)
        logits += [*q35c.Session.decode_together([session, other], [6, 7])]
        with model.record() as recordings:
            logits.append(session.decode(8))
        assert len(recordings) == 1
        session.reset()
        logits.append(session.prefill([9]))
        return np.stack(logits)


@pytest.fixture
def cpu(artifacts: tuple[Path, Path]) -> Iterator[q35c.Session]:
    with q35c.load(artifacts[0], threads=1) as model, model.session() as session:
        yield session


def cases(calls: dict[str, int], *, every: bool) -> Iterator[tuple[str, int, int]]:
    for function, count in calls.items():
        codes = (INVALID, OUT_OF_MEMORY, FAULT) if every else (INVALID, FAULT)
        yield from ((function, 1, code) for code in codes)
        later = range(2, count + 1) if every else {count} - {1}
        yield from ((function, number, OUT_OF_MEMORY) for number in later)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_every_call_may_fail(artifacts: tuple[Path, Path], cpu: q35c.Session, emulated: Emulated, every: bool) -> None:  # fmt: skip
    path = artifacts[1]
    emulated.watch()
    expected = live_a_life(path)
    calls = emulated.calls()
    assert set(FUNCTIONS) - set(calls) <= UNSEEN
    assert calls.keys() <= FUNCTIONS.keys()
    last_use = ("cuCtxPushCurrent_v2", calls["cuCtxPushCurrent_v2"])  # to give all back
    for case in cases(calls, every=every):
        function, number, code = case
        is_giving_back = function in GIVES_BACK or (function, number) == last_use
        emulated.fail(*case)
        error = None
        try:
            live_a_life(path)
        except Q35CError as caught:
            error = caught
            caught.__traceback__ = None
        if emulated.taken():
            gc.collect()
        taken = emulated.taken()
        emulated.recover()
        if error is None:
            assert is_giving_back, case
        else:
            check(error, case)
        if not is_giving_back and code != FAULT:
            assert taken == {}, case
    assert np.array_equal(live_a_life(path), expected)
    assert np.isfinite(cpu.prefill([3, 4])).all()


def check(error: Q35CError, case: tuple[str, int, int]) -> None:
    function, _, code = case
    if isinstance(error, NoDevice):
        assert function in ("cuInit", "cuDeviceGetAttribute", "cuDeviceGetCount"), case
        return
    kinds = {OUT_OF_MEMORY: OutOfDeviceMemory, FAULT: DeviceFault, INVALID: DeviceError}
    assert type(error) is kinds[code] or function in GIVES_BACK, (case, repr(error))
    # What goes wrong while giving back is what a later call says.
    assert f"{function}: CUDA_ERROR" in str(error) or function in GIVES_BACK, (case, str(error))
    assert str(error.where).startswith("cuda:0"), (case, error.where)
