"""What kernels would move on a device: whole sectors of weights, states, keys and values, once, and no queue at a bank."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.harness import CudaKernels, request
from tests.cuda.machine import Traffic
from tests.cuda.rows import stored_rows
from tests.kernels.harness import pack_formatted

N, K = 96, 256
FORMATS = [
    ("f32", "f32"),
    ("bf16", "bf16"),
    ("i4g64", "q8g64"),
    ("i5g64", "q8g64"),
    ("i8g32", "q8g32"),
]
ATTENTION = {"Hq": 4, "Hkv": 2, "D": 64, "context": 256, "rows": "batch"}
DELTA = {"Hk": 2, "Hv": 4, "Dk": 32, "Dv": 64, "K": 4, "rows": "batch"}
SIZES = {"f32": 4, "bf16": 2}


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    asked = {}
    for dtype, rows in FORMATS:
        shape = {"N": N, "K": K, "dtype": dtype, "rows": rows, "epilogue": "none"}
        asked[f"linear_{dtype}"] = request("linear", **shape, tile=1)
        if rows != "f32":
            asked[f"tiles_{dtype}"] = request("linear_tiles", **shape)
    for kv_dtype, size in SIZES.items():
        offset = size * 2 * 256 * 64
        asked[f"attention_{kv_dtype}"] = request(
            "attention", **ATTENTION, kv_dtype=kv_dtype, v_offset_bytes=offset, splits=1
        )
    asked["scan"] = request("delta_scan", **DELTA)
    return CudaKernels(asked)


def assert_whole(traffic: Traffic, least: float = 0.95) -> None:
    assert traffic.share >= least, traffic


@pytest.mark.parametrize("family", ["linear", "tiles"])
@pytest.mark.parametrize(("dtype", "rows"), FORMATS)
def test_weights_are_read_once_in_whole_sectors(kernels: CudaKernels, dtype: str, rows: str, family: str) -> None:  # fmt: skip
    if f"{family}_{dtype}" not in kernels.requests:
        pytest.skip("no tensor cores for f32")
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal(size).astype(np.float32) for size in ((N, K), (1, K)))
    w = pack_formatted(weight, dtype).view(np.float32 if dtype == "f32" else np.uint32)
    given = {"w": w, "x": stored_rows(x, rows), "y": np.full((1, N), np.nan, np.float32)}
    found = kernels.traffic(f"{family}_{dtype}", 1, **given)
    assert found["shared"].ways <= 2
    if family == "linear" or dtype == "bf16":
        assert_whole(found["w"], 0.95)
    if family == "linear":
        # The exponents of a block are read for each group: from the L1 cache but once.
        assert found["w"].moved <= 1.05 * w.nbytes + N * K // 32


@pytest.mark.parametrize("kv_dtype", SIZES)
def test_keys_and_values(kernels: CudaKernels, kv_dtype: str) -> None:
    kind = np.float32 if kv_dtype == "f32" else np.uint16
    state = np.ones(2 * 2 * 256 * 64, kind)
    ones = {"q": np.ones((1, 256), np.float32), "qg": np.ones((1, 512), np.float32)}
    place = {"slots": np.zeros(1, np.int64), "starts": np.full(1, 127, np.int32)}
    empty = np.full((1, 256), np.nan, np.float32)
    found = kernels.traffic(f"attention_{kv_dtype}", 1, state=state, **ones, **place, y=empty)
    assert_whole(found["state"])
    assert found["shared"].ways <= 2
    # Each of two query heads reads its key head's 128 cells: from memory once, then from the L2 cache.
    assert found["state"].asked == 2 * 2 * 2 * 128 * 64 * state.itemsize


def test_recurrent_state(kernels: CudaKernels) -> None:
    C = 2 * 2 * 32 + 4 * 64
    words = 4 * 32 * 64
    given = {
        "conv_state": np.ones(3 * C, np.float32), "state": np.ones(words, np.float32), "slots": np.zeros(1, np.int64),
        "qkv": np.ones((1, C), np.float32), "mixed": np.ones((1, C), np.float32), "gates": np.ones((1, 8), np.float32),
        "o": np.full((1, 256), np.nan, np.float32),
    }  # fmt: skip
    found = kernels.traffic("scan", 1, **given)
    assert_whole(found["state"], 1.0)
    assert found["state"].moved == 2 * 4 * words  # there and back
    assert found["shared"].ways == 1


def test_part_of_a_sector_is_seen(kernels: CudaKernels) -> None:
    """Counting itself: where all lanes read the same word, a sector of eight is moved."""
    rng = np.random.default_rng(0)
    w = pack_formatted(rng.standard_normal((N, K)).astype(np.float32), "f32").view(np.float32)
    given = {"w": w, "x": np.ones((1, K), np.float32), "y": np.full((1, N), np.nan, np.float32)}
    found = kernels.traffic("linear_f32", 1, **given)
    assert found["x"].share == 1 / 8 and found["y"].share == 1
