"""Products of many rows on the machine's tensor cores: every format, ragged in all directions, the same bits for a row wherever it is."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.harness import CudaKernels, request
from tests.cuda.machine import ORDERS
from tests.cuda.rows import row_values, stored_rows
from tests.kernels.harness import assert_close, pack_formatted, stored

# N, K, weights, rows, epilogue: outputs of parts of a block, of one and of more blocks of threads; groups of every size.
CASES = [
    (40, 200, "i4g64", "q8g64", "none"),
    (150, 96, "i8g32", "q8g32", "none"),
    (70, 160, "i5g32", "q8g32", "swiglu"),
    (32, 256, "i4g128", "q8g128", "residual"),
    (33, 100, "i5g64", "q8g64", "residual"),
    (40, 64, "bf16", "bf16", "none"),
    (70, 51, "bf16", "bf16", "swiglu"),
]


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    names = ("N", "K", "dtype", "rows", "epilogue")
    return CudaKernels(
        {
            f"tiles_{number}": request("linear_tiles", **dict(zip(names, case, strict=True)))
            for number, case in enumerate(CASES)
        }
    )


def product(number: int, tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return what a product takes, and its float64 result."""
    N, K, dtype, rows, epilogue = CASES[number]
    rng = np.random.default_rng(number)
    weight, x = (rng.standard_normal(size).astype(np.float32) for size in ((N, K), (tokens, K)))
    packed = pack_formatted(weight, dtype, "swiglu" if epilogue == "swiglu" else "linear")
    given = {"w": packed.view(np.uint32), "x": stored_rows(x, rows)}
    y = row_values(x, rows) @ stored(weight, dtype).T
    if epilogue == "residual":
        given["r"] = rng.standard_normal((tokens, N)).astype(np.float32)
        y = y + given["r"]
    if epilogue == "swiglu":
        gate, up = np.split(y, 2, 1)
        y = gate / (1 + np.exp(-gate)) * up
    return given, y


@pytest.mark.parametrize("number", range(len(CASES)))
def test_products(kernels: CudaKernels, number: int) -> None:
    for tokens in (1, 21):
        given, want = product(number, tokens)
        orders = ORDERS if number == 0 else ("forward", "backward")
        outputs = {"y": want.shape}
        y = kernels.run(f"tiles_{number}", tokens, outputs, **given, orders=orders)["y"]
        assert_close(y, want)


def test_a_row_has_the_same_bits_wherever_it_is(kernels: CudaKernels) -> None:
    given, want = product(0, 70)  # a block of threads, and part of another
    y = kernels.run("tiles_0", 70, {"y": want.shape}, **given, orders=("forward",))["y"]
    assert_close(y, want)
    for row in (0, 9, 63, 64, 69):
        alone = {"w": given["w"], "x": given["x"][row : row + 1]}
        one = kernels.run("tiles_0", 1, {"y": (1, want.shape[1])}, **alone, orders=("forward",))
        np.testing.assert_array_equal(one["y"][0], y[row])
