"""RMS norm and products on the machine: right in every order, at ragged sizes, and no barrier of theirs can go."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.harness import CudaKernels, request, unseen_barriers
from tests.cuda.machine import ORDERS
from tests.cuda.rows import row_values, stored_rows
from tests.kernels.harness import assert_close, pack_formatted, stored

# N, K, weights, rows, tile: ragged outputs and inputs, more parts than warps, every format, groups of every size.
CASES = [
    (40, 50, "f32", "f32", 2),
    (33, 147, "f32", "f32", 1),
    (64, 64, "bf16", "f32", 2),
    (40, 51, "bf16", "bf16", 1),
    (70, 320, "i4g32", "q8g32", 2),
    (32, 100, "i4g128", "q8g128", 1),
    (40, 200, "i5g64", "q8g64", 3),
    (64, 96, "i8g32", "q8g32", 1),
]
EPILOGUES = ("none", "residual", "swiglu")


def name_of(case: tuple, epilogue: str) -> str:
    return "_".join(["linear", *map(str, case), epilogue])


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    asked = {
        name_of(case, epilogue): request(
            "linear", N=N, K=K, dtype=dtype, rows=rows, epilogue=epilogue, tile=tile
        )
        for number, case in enumerate(CASES)
        for N, K, dtype, rows, tile in [case]
        for epilogue in (EPILOGUES if number in (1, 6) else ("none",))
        if epilogue != "swiglu" or N % 2 == 0
    }
    norms = {f"norm_{D}": request("rms_norm", D=D, eps=1e-6, offset=1.0) for D in (64, 300)}
    return CudaKernels(asked | norms)


@pytest.mark.parametrize(("D", "rows"), [(64, 1), (64, 5), (300, 3)])
def test_norm(kernels: CudaKernels, D: int, rows: int) -> None:
    rng = np.random.default_rng(D)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, D), D))
    y = kernels.run(f"norm_{D}", rows, {"y": (rows, D)}, x=x, w=w, orders=ORDERS)["y"]
    exact = x.astype(np.float64)
    assert_close(y, exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-6) * (1 + w))


def arguments(case: tuple, epilogue: str, tokens: int, seed: int = 0) -> tuple[dict, np.ndarray]:
    """Return what a product takes, and its float64 result."""
    N, K, dtype, rows, _ = case
    rng = np.random.default_rng(seed)
    weight, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, K), (tokens, K)))
    layout = "swiglu" if epilogue == "swiglu" else "linear"
    packed = pack_formatted(weight, dtype, layout)
    given = {"w": packed if dtype == "f32" else packed.view(np.uint32), "x": stored_rows(x, rows)}
    y = row_values(x, rows) @ stored(weight, dtype).T
    if epilogue == "residual":
        given["r"] = rng.standard_normal((tokens, N)).astype(np.float32)
        y = y + given["r"]
    if epilogue == "swiglu":
        gate, up = np.split(y, 2, 1)
        y = gate / (1 + np.exp(-gate)) * up
    return given, y


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(case, ""))
def test_products(kernels: CudaKernels, case: tuple, tokens: int) -> None:
    for epilogue in EPILOGUES:
        if name_of(case, epilogue) not in kernels.requests:
            continue
        given, want = arguments(case, epilogue, tokens)
        y = kernels.run(name_of(case, epilogue), tokens, {"y": want.shape}, **given)["y"]
        assert_close(y, want, note=epilogue)


def test_no_barrier_can_go(kernels: CudaKernels) -> None:
    name = name_of(CASES[6], "none")
    given, want = arguments(CASES[6], "none", 3)
    empty = np.full(want.shape, np.nan, np.float32)
    assert unseen_barriers(kernels, name, 3, **given, y=empty) == 0
    x, w = np.ones((2, 300), np.float32), np.ones(300, np.float32)
    assert unseen_barriers(kernels, "norm_300", 2, x=x, w=w, y=np.full_like(x, np.nan)) == 0


def test_a_kernel_that_reads_or_writes_too_far_is_found(kernels: CudaKernels) -> None:
    x, w = np.ones((2, 64), np.float32), np.ones(64, np.float32)
    found = kernels.find("norm_64", 3, x=x, w=w, y=np.full_like(x, np.nan))
    assert any("out of bounds" in finding for finding in found)
    found = kernels.find("norm_64", 2, x=x, w=w[:-1], y=np.full_like(x, np.nan))
    assert any("out of bounds" in finding for finding in found)
    found = kernels.find("norm_64", 2, x=np.full_like(x, np.nan), w=w, y=np.full_like(x, np.nan))
    assert any("nobody wrote" in finding for finding in found)
